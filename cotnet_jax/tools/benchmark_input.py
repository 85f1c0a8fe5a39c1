"""Measure how fast this machine makes training images: bare loops, then the pipeline with Grain.

Without --data_dir the images are fake 500x375 JPEGs in memory, at the default --quality about as
large as ImageNet's 110 kB; with it, imagenet2012 is read from there. Nothing else should run
meanwhile.

The column `of bare` compares with the same number of bare loops, each in its own process, which
never wait for each other: at 0.9 the pipeline loses a tenth. What several bare loops lose against
the rate of one, times their number, is the machine's limit.
"""

import argparse
import io
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor

import grain
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from cotnet_jax.configs import default
from cotnet_jax.data import imagenet, pipeline, randaugment, transforms
from cotnet_jax.data.examples import TrainExample
from cotnet_jax.data.parallelism import available_cores
from cotnet_jax.data.sources import DatasetError, Element, Source, open_source

_RECIPE = "rand-m15-mstd0.5-n2"
# config.augment.randaugment, and the name of the row.
_AUGMENTS = {
    "plain": ("", "decode + crop + flip"),
    "randaugment": (_RECIPE, "the same + RandAugment"),
}
_HEIGHT, _WIDTH = 375, 500
_IMAGE_SIZE = 224
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_EXAMPLES = (
    "python -m cotnet_jax.tools.benchmark_input",
    "python -m cotnet_jax.tools.benchmark_input --threads= --workers=1,2,4 --augment=randaugment",
    "python -m cotnet_jax.tools.benchmark_input --data_dir=DATA_DIR --batch_size=256",
)


class FakeJpegs:
    """A source of 500x375 JPEGs of waves and noise, held in memory."""

    num_classes, class_names = 1, ("fake",)

    def __init__(self, number: int, length: int, quality: int):
        self._length = length
        random = np.random.RandomState(0)
        self._images = [self._make(random, quality) for _ in range(number)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Element:
        image = self._images[index % len(self._images)]
        return {"image": image, "label": 0, "file_name": ""}

    def mean_bytes(self) -> float:
        """Return the mean size of the files in bytes."""
        return float(np.mean([len(data) for data in self._images]))

    @staticmethod
    def _make(random: np.random.RandomState, quality: int) -> bytes:
        y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH] + random.randint(0, 1000, (2, 1, 1))
        waves = np.stack([np.sin(x / a) * np.cos(y / b) for a, b in random.uniform(5, 40, (3, 2))])
        noise = random.normal(0, 24, (_HEIGHT, _WIDTH, 3))
        image = np.clip(128 + 90 * np.moveaxis(waves, 0, -1) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return file.getvalue()


def main():
    args = _parse()
    # Grain's workers read absl's flags, which only absl.app parses.
    flags.FLAGS.mark_as_parsed()
    if args.data_dir:
        data = ml_collections.ConfigDict(
            {"name": imagenet.NAME, "data_dir": args.data_dir, "fake": False}
        )
        try:
            source: Source = open_source(data, "train")
        except DatasetError as error:
            sys.exit(f"error: {error}")
        print(f"{imagenet.NAME} in {args.data_dir}, {len(source):,} images")
    else:
        source = fake = FakeJpegs(256, imagenet.NUM_IMAGES["train"], args.quality)
        print(f"fake {_WIDTH}x{_HEIGHT} JPEGs of {fake.mean_bytes() / 1000:.0f} kB, in memory")
    cores = available_cores()
    print(f"{cores} cores, batch {args.batch_size}, {args.seconds:g} s per row\n")
    print(f"{'':34} {'threads':>7} {'workers':>7} {'images/s':>9} {'a core':>7} {'of bare':>7}")
    for recipe, title in (_AUGMENTS[name] for name in args.augment):
        config = _config(args.batch_size, recipe)
        bare: dict[int, float] = {}
        for processes in sorted({1, *args.threads, *args.workers}):
            bare[processes] = _bare_rate(source, config, processes, args.seconds)
            _row(f"{title}, bare", 0, processes, bare)
        for threads in args.threads:
            config.data.num_threads, config.data.num_workers = threads, 0
            rate = _rate(_through_grain(source, config), args.seconds)
            _row(f"{title}, Grain", threads, 0, bare, rate)
        for workers in args.workers:
            config.data.num_threads, config.data.num_workers = 1, workers
            rate = _rate(_through_grain(source, config), args.seconds)
            _row(f"{title}, Grain", 1, workers, bare, rate)
    _print_stages(source, args.seconds)


def _parse() -> argparse.Namespace:
    cores = available_cores()
    powers = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    default = sorted({*powers, cores})

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    def names(text: str) -> list[str]:
        if unknown := [word for word in text.split(",") if word not in _AUGMENTS]:
            known = ", ".join(_AUGMENTS)
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {known}")
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.benchmark_input",
        usage="\n  ".join(["", *_EXAMPLES]),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_text = f"default {','.join(map(str, default))}"
    parser.add_argument(
        "--threads",
        type=numbers,
        default=default,
        metavar="N,...",
        help=f"numbers of threads to measure without workers; {default_text}",
    )
    parser.add_argument(
        "--workers",
        type=numbers,
        default=default,
        metavar="N,...",
        help=f"numbers of worker processes to measure, of one thread each; {default_text}",
    )
    parser.add_argument(
        "--augment",
        type=names,
        default=list(_AUGMENTS),
        metavar="NAME,...",
        help=f"any of {', '.join(_AUGMENTS)}; default all",
    )
    parser.add_argument("--batch_size", type=int, default=128, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=10, help="per row; default %(default)s")
    parser.add_argument(
        "--quality", type=int, default=90, help="of fake JPEGs; default %(default)s"
    )
    parser.add_argument("--data_dir", default="", help="folder of the prepared imagenet2012")
    return parser.parse_args()


def _config(batch_size: int, recipe: str) -> ml_collections.ConfigDict:
    """Return the ImageNet recipe with other augmentation, read by one thread."""
    config = default.get_config()
    config.batch_size = batch_size
    config.data.num_threads = 1
    config.augment.randaugment = recipe
    config.augment.color_jitter = 0.0
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


def _rate(batches: Generator[int, None, None], seconds: float) -> float:
    """Return images per second, measured after the first batches, which were prefetched."""
    for _ in range(4):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += next(batches)
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


def _bare_rate(
    source: Source, config: ml_collections.ConfigDict, processes: int, seconds: float
) -> float:
    """Return images per second, summed over this many bare loops in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        barrier = spawn.Manager().Barrier(processes)
        loops = [
            pool.submit(_one_bare_loop, source, config.to_dict(), seconds, barrier)
            for _ in range(processes)
        ]
        return sum(loop.result() for loop in loops)


def _one_bare_loop(source: Source, config: dict, seconds: float, barrier) -> float:
    loop = _bare_loop(source, ml_collections.ConfigDict(config))
    barrier.wait()
    return _rate(loop, seconds)


def _row(title: str, threads: int, workers: int, bare: dict[int, float], rate: float | None = None):
    parallel = max(threads, workers)
    rate = bare[parallel] if rate is None else rate
    cores = min(parallel, available_cores())
    print(
        f"{title:34} {threads:7} {workers:7} {rate:9.0f} {rate / cores:7.0f} "
        f"{rate / bare[parallel]:7.2f}",
        flush=True,
    )


def _print_stages(source: Source, seconds: float):
    """Print what one image costs in one thread, stage by stage."""
    rng = np.random.default_rng(0)
    data = [image for i in range(64) if isinstance(image := source[i]["image"], bytes)]
    decoded = [transforms.decode(image) for image in data]
    augment = randaugment.parse(_RECIPE)
    assert augment is not None

    def crop(index: int) -> Image.Image:
        return transforms.random_resized_crop(
            decoded[index], _IMAGE_SIZE, rng, scale=_SCALE, ratio=_RATIO, interpolation="bicubic"
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


if __name__ == "__main__":
    main()
