"""Measure how fast this machine makes training images, in every mode of the input pipeline.

Without --data_dir the images are fake JPEGs in memory, of 500x375 pixels and at the default
--quality about as large as ImageNet's 110 kB; with it, imagenet2012 is read from there. Nothing
else should run meanwhile; --rounds measures all rows in turn, so many times, and prints medians.

Bare loops, each in its own process, have no Grain and never wait for each other. The column `of
bare` compares with as many of them: at 0.9 the pipeline loses a tenth. What several bare loops lose
against the rate of one, times their number, is the machine's limit.

With --processor_time one bare loop a mode is measured by its processor time: what other programs
take does not count, so it works on a machine that is not idle.
"""

import argparse
import dataclasses
import io
import itertools
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import grain
import ml_collections
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from cotnet_jax.command_line import positive
from cotnet_jax.configs import default
from cotnet_jax.data import imagenet, pipeline, randaugment, scaled_decoding, transforms
from cotnet_jax.data.examples import TrainExample
from cotnet_jax.data.parallelism import available_cores, choose_parallelism
from cotnet_jax.data.prepare.shrink import shrink
from cotnet_jax.data.sources import DatasetError, Element, Source, open_source

_RECIPE = default.get_config()
_SMALL = "small"
# Fields of the recipe that differ in each mode, and what it is.
_MODES: dict[str, tuple[Mapping[str, Any], str]] = {
    "host": ({}, "RandAugment on the host"),
    "device": ({"augment.randaugment_on": "device"}, "RandAugment on the device"),
    "scaled": (
        {"augment.randaugment_on": "device", "data.scaled_decoding": True},
        "the same, scaled decoding",
    ),
    _SMALL: ({"augment.randaugment_on": "device"}, "the same, images stored smaller"),
}
# Of all fake JPEGs together: 256 of 500x375.
_FAKE_PIXELS = 256 * 500 * 375
# Of the crops that show what scaled decoding does to pixels: small enough for photographs of
# 640 x 427.
_PSNR_SIDE, _PSNR_CROPS = 112, 1000
_EXAMPLES = (
    "python -m cotnet_jax.tools.benchmark_input",
    "python -m cotnet_jax.tools.benchmark_input --threads= --workers=1,2 --rounds=5 --seconds=2",
    "python -m cotnet_jax.tools.benchmark_input --processor_time --image=2000x1500",
    "python -m cotnet_jax.tools.benchmark_input --data_dir=DATA_DIR --batch_size=256",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: bare loops in ``workers`` processes, or Grain.

    Attributes:
      mode: one of ``_MODES``.
      loop: "bare" or "Grain".
      threads, workers: as config.data.num_threads and num_workers.
    """

    mode: str
    loop: str
    threads: int
    workers: int

    @property
    def cores(self) -> int:
        """Cores that can be busy."""
        return min(max(self.threads, self.workers), available_cores())


class FakeJpegs:
    """A source of JPEGs of waves and noise, held in memory.

    Args:
      number: of different images.
      length: of the source.
      quality: of the JPEGs.
      width, height: in pixels.
    """

    num_classes, class_names = 1, ("fake",)

    def __init__(self, number: int, length: int, quality: int, width: int = 500, height: int = 375):
        self._length = length
        random = np.random.RandomState(0)
        self._images = [self._make(random, quality, width, height) for _ in range(number)]

    def shrink(self, short_side: int) -> "FakeJpegs":
        """Return the source that ``cotnet-prepare --size`` would make of this one."""
        smaller = FakeJpegs(0, self._length, 0)
        smaller._images = [self._shrink(data, short_side) for data in self._images]
        return smaller

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Element:
        image = self._images[index % len(self._images)]
        return {"image": image, "label": 0, "file_name": ""}

    def mean_bytes(self) -> float:
        """Return the mean size of the files in bytes."""
        return float(np.mean([len(data) for data in self._images]))

    @staticmethod
    def _shrink(data: bytes, short_side: int) -> bytes:
        image = transforms.decode(data)
        return shrink(image, short_side, 1) if min(image.shape[:2]) > short_side else data

    @staticmethod
    def _make(random: np.random.RandomState, quality: int, width: int, height: int) -> bytes:
        y, x = np.mgrid[0:height, 0:width] + random.randint(0, 1000, (2, 1, 1))
        waves = np.stack([np.sin(x / a) * np.cos(y / b) for a, b in random.uniform(5, 40, (3, 2))])
        noise = random.normal(0, 24, (height, width, 3))
        image = np.clip(128 + 90 * np.moveaxis(waves, 0, -1) + noise, 0, 255).astype(np.uint8)
        return _encode(image, quality)


def main():
    args = _parse()
    sources = _sources(args)
    cores = available_cores()
    rows = [
        row
        for mode in sources
        for row in (
            *(Row(mode, "bare", 0, n) for n in sorted({1, *args.threads, *args.workers})),
            *(Row(mode, "Grain", n, 0) for n in args.threads),
            *(Row(mode, "Grain", 1, n) for n in args.workers),
        )
    ]
    rates: dict[Row, list[float]] = {row: [] for row in rows}
    turns = list(itertools.product(range(args.rounds), rows))
    for _, row in tqdm(turns, desc="measuring", unit=" rows"):
        config = _config(row, args.batch_size)
        if row.loop == "bare":
            clock = time.process_time if args.processor_time else time.perf_counter
            rate = _bare_rate(sources[row.mode], config, row.workers, args.seconds, clock)
        else:
            rate = _rate(_through_grain(sources[row.mode], config), args.seconds)
        rates[row].append(rate)
    chosen = choose_parallelism(default.get_config().data, args.batch_size)
    print(f"{cores} cores, for which {chosen} would be chosen; batch {args.batch_size}")
    time_text = f"{args.seconds:g} s{' of processor time' * args.processor_time}"
    print(f"medians of {args.rounds} times {time_text}\n")
    _print_rows({row: statistics.median(measured) for row, measured in rates.items()})
    _print_stages(next(iter(sources.values())), args.seconds)
    _print_psnr()


def _sources(args: argparse.Namespace) -> dict[str, Source]:
    """Return the source of each mode's images, after saying what they are."""
    if args.data_dir:
        data = ml_collections.ConfigDict(
            {"name": imagenet.NAME, "data_dir": args.data_dir, "fake": False}
        )
        try:
            source: Source = open_source(data, "train")
        except DatasetError as error:
            sys.exit(f"error: {error}")
        print(f"{imagenet.NAME} in {args.data_dir}, {len(source):,} images")
        # A smaller copy is another folder.
        return {mode: source for mode in args.modes if mode != _SMALL}
    width, height = args.image
    # Fewer large ones: each bare loop gets a copy of all of them.
    number = max(16, min(256, _FAKE_PIXELS // (width * height)))
    fake = FakeJpegs(number, imagenet.NUM_IMAGES["train"], args.quality, width, height)
    print(f"fake {width}x{height} JPEGs of {fake.mean_bytes() / 1000:.0f} kB, in memory")
    sources: dict[str, Source] = dict.fromkeys(args.modes, fake)
    if _SMALL in sources:
        sources[_SMALL] = small = fake.shrink(args.size)
        print(f"{_SMALL}: short side of {args.size}, {small.mean_bytes() / 1000:.0f} kB")
    return sources


def _parse() -> argparse.Namespace:
    cores = available_cores()
    powers = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    defaults = sorted({*powers, cores})

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    def names(text: str) -> list[str]:
        if unknown := [word for word in text.split(",") if word not in _MODES]:
            known = ", ".join(_MODES)
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {known}")
        return text.split(",")

    def width_and_height(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match or "0" in match.groups():
            raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, such as 500x375, not {text!r}")
        return int(match[1]), int(match[2])

    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.benchmark_input",
        usage="\n  ".join(["", *_EXAMPLES]),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_text = f"default {','.join(map(str, defaults))}"
    parser.add_argument(
        "--threads",
        type=numbers,
        default=defaults,
        metavar="N,...",
        help=f"numbers of threads to measure without workers; {default_text}",
    )
    parser.add_argument(
        "--workers",
        type=numbers,
        default=defaults,
        metavar="N,...",
        help=f"numbers of worker processes to measure, of one thread each; {default_text}",
    )
    parser.add_argument(
        "--modes",
        type=names,
        default=list(_MODES),
        metavar="NAME,...",
        help="any of "
        + ", ".join(f"{name} ({text})" for name, (_, text) in _MODES.items())
        + "; default all",
    )
    parser.add_argument("--batch_size", type=positive, default=128, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=10, help="per row; default %(default)s")
    parser.add_argument("--rounds", type=positive, default=1, help="default %(default)s")
    parser.add_argument(
        "--processor_time", action="store_true", help="measure one bare loop a mode, and that in it"
    )
    parser.add_argument(
        "--image",
        type=width_and_height,
        default=(500, 375),
        metavar="WIDTHxHEIGHT",
        help="of fake JPEGs; default 500x375",
    )
    parser.add_argument(
        "--quality", type=int, default=90, help="of fake JPEGs; default %(default)s"
    )
    parser.add_argument(
        "--size", type=positive, default=320, help="short side, stored smaller; default %(default)s"
    )
    parser.add_argument("--data_dir", default="", help="folder of the prepared imagenet2012")
    args = parser.parse_args()
    if not 0 < args.seconds < float("inf"):
        parser.error(f"--seconds: must be a number above 0, not {args.seconds:g}")
    if args.data_dir and args.modes == [_SMALL]:
        parser.error(
            f"--modes={_SMALL}: is of fake images; give a copy prepared with --size as --data_dir, "
            "and --modes=device"
        )
    if args.processor_time:
        args.threads, args.workers = [], []
    return args


def _config(row: Row, batch_size: int) -> ml_collections.ConfigDict:
    """Return the ImageNet recipe with the fields of a mode."""
    config = default.get_config()
    config.batch_size = batch_size
    config.data.num_threads, config.data.num_workers = row.threads, row.workers
    config.update_from_flattened_dict(_MODES[row.mode][0])
    return config


def _bare_loop(source: Source, config: ml_collections.ConfigDict) -> Generator[int, None, None]:
    """Do the same work without Grain, one image after the other; yield the size of each batch."""
    example = TrainExample(source, config)
    rng = np.random.default_rng(0)
    order = (int(index) for index in iter(lambda: rng.integers(len(source)), -1))
    while indices := list(itertools.islice(order, config.batch_size)):
        np.stack([example(index, rng)["image"] for index in indices])
        yield len(indices)


def _through_grain(source: Source, config: ml_collections.ConfigDict) -> Generator[int, None, None]:
    batches = pipeline.train_batches(config, start_step=0, source=source)
    try:
        for batch in batches:
            yield len(batch["image"])
    finally:
        batches.close()


def _rate(
    batches: Generator[int, None, None],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return images per second, measured after the first batches, which were prefetched."""
    for _ in range(4):
        next(batches)
    count, start = 0, clock()
    while clock() - start < seconds:
        count += next(batches)
    rate = count / (clock() - start)
    batches.close()
    return rate


def _bare_rate(
    source: Source,
    config: ml_collections.ConfigDict,
    processes: int,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """Return images per second, summed over this many bare loops in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        barrier = spawn.Manager().Barrier(processes)
        loops = [
            pool.submit(_one_bare_loop, source, config.to_dict(), seconds, clock, barrier)
            for _ in range(processes)
        ]
        return sum(loop.result() for loop in loops)


def _one_bare_loop(
    source: Source, config: dict, seconds: float, clock: Callable[[], float], barrier
) -> float:
    loop = _bare_loop(source, ml_collections.ConfigDict(config))
    barrier.wait()
    return _rate(loop, seconds, clock)


def _print_rows(rates: Mapping[Row, float]) -> None:
    print(
        f"{'':42} {'loop':6} {'threads':>7} {'workers':>7} {'images/s':>9} {'a core':>7} "
        f"{'of bare':>7}"
    )
    for row, rate in rates.items():
        bare = rates[Row(row.mode, "bare", 0, max(row.threads, row.workers))]
        title = f"{row.mode}: {_MODES[row.mode][1]}"
        print(
            f"{title:42} {row.loop:6} {row.threads:7} {row.workers:7} {rate:9.0f} "
            f"{rate / row.cores:7.0f} {rate / bare:7.2f}"
        )


def _print_stages(source: Source, seconds: float):
    """Print what one image costs in one thread, stage by stage."""
    rng = np.random.default_rng(0)
    data = [image for i in range(64) if isinstance(image := source[i]["image"], bytes)]
    decoded = [transforms.decode(image) for image in data]
    data_config, augment_config = _RECIPE.data, _RECIPE.augment
    augment = randaugment.parse(augment_config.randaugment)
    assert augment is not None

    def crop(index: int) -> Image.Image:
        return transforms.random_resized_crop(
            decoded[index],
            data_config.image_size,
            rng,
            scale=augment_config.scale,
            ratio=augment_config.ratio,
            interpolation=data_config.interpolation,
        )

    cropped = [crop(index) for index in range(len(decoded))]
    stages: dict[str, Callable[[int], object]] = {
        "decode": lambda i: transforms.decode(data[i]),
        "random resized crop": crop,
        "flip": lambda i: transforms.random_flip(cropped[i], rng, 0.5),
        "RandAugment": lambda i: augment(cropped[i], rng),
        "to array": lambda i: np.asarray(cropped[i]),
    }
    shuffled = grain.MapDataset.range(len(source)).shuffle(seed=0).repeat()
    keyed = shuffled.random_map(lambda index, rng: index, seed=0)
    stages["Grain's order and random key"] = lambda i: keyed[i]
    print(f"\n{'one image, one thread':34} {'ms':>7}")
    for name, stage in stages.items():
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 4:
            stage(count % len(data))
            count += 1
        print(f"{name:34} {(time.perf_counter() - start) / count * 1e3:7.3f}", flush=True)


def _print_psnr() -> None:
    """Print how far the pixels of scaled decoding are from those of full decoding."""
    photos = [_encode(photo, quality=95) for photo in load_sample_images().images]
    ratios = [_psnr(photo, seed) for photo in photos for seed in range(_PSNR_CROPS)]
    # Of smaller crops, which are decoded in full, all pixels are equal.
    differing = [ratio for ratio in ratios if ratio < np.inf]
    print(
        f"\nscaled decoding, two photographs of 640x427, crops to {_PSNR_SIDE}: PSNR "
        f"{np.median(differing):.1f} dB (median), {min(differing):.1f} (least) of the "
        f"{len(differing)} of {len(ratios)} crops that it decodes"
    )


def _psnr(photo: bytes, seed: int) -> float:
    """Return the peak signal-to-noise ratio of a crop by scaled decoding, in dB."""
    full, scaled = (
        np.asarray(
            scaled_decoding.random_resized_crop(
                photo,
                _PSNR_SIDE,
                np.random.default_rng(seed),
                scaled=is_scaled,
                scale=_RECIPE.augment.scale,
                ratio=_RECIPE.augment.ratio,
                interpolation=_RECIPE.data.interpolation,
            ),
            float,
        )
        for is_scaled in (False, True)
    )
    error = float(np.mean((full - scaled) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _encode(image: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


if __name__ == "__main__":
    main()
