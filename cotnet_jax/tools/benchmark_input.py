"""Prints how fast the host makes training images: bare loops, then through Grain.

    python -m cotnet_jax.tools.benchmark_input [--threads=1,2,4] [--workers=1,2,4] [--data_dir=DIR]
        [--augment=plain,randaugment]

Without --data_dir it makes 500x375 JPEGs in memory, whose bytes are about ImageNet's 110 kB at
--quality=90; with it, it reads imagenet2012 from there. Nothing else should be running: rates are
by the clock on the wall. The column `of bare` compares with as many bare loops in processes of
their own, which wait for nothing: what is missing to 1 there is the pipeline's, and what is missing
to the bare loops of one process the machine's.
"""

import argparse
import io
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import grain
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from cotnet_jax.data import pipeline, randaugment, transforms
from cotnet_jax.data.sources import Source, open_source

_RECIPE = "rand-m15-mstd0.5-n2"
# RandAugment's text, and what the rows are called.
_AUGMENTS = {
    "plain": ("", "decode + crop + flip"),
    "randaugment": (_RECIPE, "the same + RandAugment"),
}
_HEIGHT, _WIDTH = 375, 500


class MadeUpJpegs:
    """A source of 500x375 JPEGs of waves and noise, held in memory."""

    num_classes, class_names = 1, ("made up",)

    def __init__(self, number: int, length: int, quality: int):
        self._length = length
        random = np.random.RandomState(0)
        self._images = [self._make(random, quality) for _ in range(number)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, bytes | int | str]:
        image = self._images[index % len(self._images)]
        return {"image": image, "label": 0, "file_name": ""}

    def mean_bytes(self) -> float:
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
        data = ml_collections.ConfigDict({"name": "imagenet2012", "data_dir": args.data_dir})
        source = open_source(data, "train")
        print(f"imagenet2012 in {args.data_dir}, {len(source):,} images")
    else:
        source = MadeUpJpegs(256, 1_281_167, args.quality)
        print(f"{_WIDTH}x{_HEIGHT} JPEGs of {source.mean_bytes() / 1000:.0f} kB, in memory")
    cores = pipeline.available_cores()
    print(f"{cores} cores, batch {args.batch_size}, {args.seconds:g} s a row\n")
    print(f"{'what':34} {'threads':>7} {'workers':>7} {'images/s':>9} {'a core':>7} {'of bare':>7}")
    for text, title in (_AUGMENTS[name] for name in args.augment):
        config = _config(args, text)
        bare = {}
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
    _parts(source, args.seconds)


def _parse() -> argparse.Namespace:
    cores = pipeline.available_cores()
    powers = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    default = sorted({*powers, cores})

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    def names(text: str) -> list[str]:
        if unknown := [word for word in text.split(",") if word not in _AUGMENTS]:
            known = ", ".join(_AUGMENTS)
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {known}")
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.benchmark_input",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=numbers, default=default)
    parser.add_argument("--workers", type=numbers, default=default)
    parser.add_argument("--augment", type=names, default=list(_AUGMENTS))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--quality", type=int, default=90, help="of the made-up JPEGs")
    parser.add_argument("--data_dir", default="")
    return parser.parse_args()


def _config(args: argparse.Namespace, text: str) -> ml_collections.ConfigDict:
    """The recipe's fields that the pipeline reads."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "batch_size": args.batch_size,
            "data": {
                "name": "benchmark",
                "image_size": 224,
                "interpolation": "bicubic",
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "num_threads": 1,
                "num_workers": 0,
                "prefetch": 2,
                "max_undecodable": 0.001,
            },
            "augment": {
                "scale": (0.08, 1.0),
                "ratio": (3 / 4, 4 / 3),
                "flip": 0.5,
                "randaugment": text,
                "color_jitter": 0.0,
                "erasing_probability": 0.0,
            },
        }
    )


def _bare_loop(source: Source, config: ml_collections.ConfigDict) -> Iterator[int]:
    """The same work without Grain: one image after the other, gathered into batches."""
    example = pipeline.TrainExample(source, config)
    rng = np.random.default_rng(0)
    order = (int(index) for index in iter(lambda: rng.integers(len(source)), -1))
    while indices := list(itertools.islice(order, config.batch_size)):
        np.stack([example(index, rng)["image"] for index in indices])
        yield len(indices)


def _through_grain(source: Source, config: ml_collections.ConfigDict) -> Iterator[int]:
    batches = pipeline.train_batches(config, start_step=0, source=source)
    try:
        for batch in batches:
            yield len(batch["image"])
    finally:
        batches.close()


def _rate(batches: Iterator[int], seconds: float) -> float:
    """Images a second, once everything is running and the first buffers are empty."""
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
    """Images a second of so many bare loops at once."""
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


def _row(what: str, threads: int, workers: int, bare: dict[int, float], rate: float | None = None):
    parallel = max(threads, workers)
    rate = bare[parallel] if rate is None else rate
    cores = min(parallel, pipeline.available_cores())
    print(
        f"{what:34} {threads:7} {workers:7} {rate:9.0f} {rate / cores:7.0f} "
        f"{rate / bare[parallel]:7.2f}",
        flush=True,
    )


def _parts(source: Source, seconds: float):
    """What one image costs, step by step, in one thread."""
    rng = np.random.default_rng(0)
    data = [source[index]["image"] for index in range(64)]
    decoded = [transforms.decode(image) for image in data]
    crop = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bicubic"}
    cropped = [transforms.random_resized_crop(image, 224, rng, **crop) for image in decoded]
    augment = randaugment.parse(_RECIPE)
    steps: dict[str, Callable[[int], object]] = {
        "decode": lambda i: transforms.decode(data[i]),
        "random resized crop": lambda i: transforms.random_resized_crop(
            decoded[i], 224, rng, **crop
        ),
        "flip": lambda i: transforms.random_flip(cropped[i], rng, 0.5),
        "RandAugment": lambda i: augment(cropped[i], rng),
        "to array": lambda i: np.asarray(cropped[i]),
    }
    shuffled = grain.MapDataset.range(len(source)).shuffle(seed=0).repeat()
    keyed = shuffled.random_map(lambda index, rng: index, seed=0)
    steps["Grain's order and random key"] = lambda i: keyed[i]
    print(f"\n{'one image, one thread':34} {'ms':>7}")
    for name, step in steps.items():
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 4:
            step(count % len(data))
            count += 1
        print(f"{name:34} {(time.perf_counter() - start) / count * 1e3:7.3f}", flush=True)


if __name__ == "__main__":
    main()
