"""Compare RandAugment on this device with the host's, operation by operation, and time it.

Colour operations and Cutout must give the host's pixels; of the geometric ones at most 1 % may
differ, by one level. Compilers round differently on each kind of device, so run it on yours.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cotnet_jax.command_line import positive
from cotnet_jax.configs import default
from cotnet_jax.data import randaugment
from cotnet_jax.training.randaugment import warps
from cotnet_jax.training.randaugment.batch import apply_operations, randaugment_batch
from cotnet_jax.training.randaugment.draw import Operations

_MAX_SHARE = 0.01
_EXAMPLES = (
    "python -m cotnet_jax.tools.check_randaugment",
    "python -m cotnet_jax.tools.check_randaugment --images=64 --size=320 --batch_size=256",
)


def main() -> None:
    args = _parse()
    random = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {args.size} x {args.size}\n")
    print(f"{'operation':14} {'largest difference':>18} {'pixels that differ':>19}")
    apply = jax.jit(apply_operations)
    wrong = []
    for name in randaugment.OP_NAMES:
        images = np.stack(list(_images(random, args.images, args.size)))
        calls = [_call(random, name, args.size) for _ in images]
        found = np.asarray(apply(images, as_operations(calls)))
        expected = [
            np.asarray(call(Image.fromarray(image)))
            for call, image in zip(calls, images, strict=True)
        ]
        difference = np.abs(found.astype(int) - np.stack(expected)).max(axis=-1)
        share = float((difference > 0).mean())
        print(f"{name:14} {difference.max():18} {share:19.6f}", flush=True)
        allowed = (1, _MAX_SHARE) if name in warps.NAMES else (0, 0.0)
        if difference.max() > allowed[0] or share > allowed[1]:
            wrong.append(name)
    if args.batch_size:
        print(f"\na batch of {args.batch_size}: {_milliseconds(random, args):.2f} ms")
    if wrong:
        sys.exit(f"error: other pixels than the host's: {', '.join(wrong)}")


def as_operations(calls: list[randaugment.Call]) -> Operations:
    """Return the host's operations in the device's form."""
    return Operations(
        op=jnp.asarray([randaugment.OP_NAMES.index(call.name) for call in calls], jnp.int32),
        value=jnp.asarray([call.value for call in calls], jnp.float32),
        center_xy=jnp.asarray([call.center_xy for call in calls], jnp.float32),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.check_randaugment",
        usage="\n  ".join(["", *_EXAMPLES]),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", type=positive, default=32, help="for each operation; default %(default)s"
    )
    parser.add_argument("--size", type=positive, default=224, help="side; default %(default)s")
    parser.add_argument(
        "--batch_size", type=int, default=640, help="of the batch that is timed; 0: none"
    )
    args = parser.parse_args()
    if args.batch_size < 0:
        parser.error(f"--batch_size: must be 0 or more, not {args.batch_size}")
    return args


def _images(random: np.random.Generator, number: int, size: int) -> Iterator[np.ndarray]:
    """Yield waves with noise, uint8 [size, size, 3]; each channel has a range of its own."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    for _ in range(number):
        a, b, c = random.uniform(-20, 20, (3, 3))
        waves = np.sin(a * x[..., None] + b * y[..., None] + c)
        waves += 0.2 * random.normal(size=waves.shape)
        low, high = np.sort(random.integers(0, 256, (2, 3)), axis=0)
        yield np.clip(low + (high - low) * (waves + 1) / 2, low, high).astype(np.uint8)


def _call(random: np.random.Generator, name: str, size: int) -> randaugment.Call:
    """Return one operation of a random magnitude that the device can draw."""
    return randaugment.Call(
        name,
        random.integers(0, round(256 * randaugment.MAX_MAGNITUDE), endpoint=True) / 256,
        int(random.choice([-1, 1])) if name in randaugment.SIGNED else 1,
        (float(np.float32(random.uniform(0, size))), float(np.float32(random.uniform(0, size)))),
    )


def _milliseconds(random: np.random.Generator, args: argparse.Namespace) -> float:
    """Return the median time of the recipe's RandAugment of a batch on the device."""
    settings = randaugment.parse(default.get_config().augment.randaugment)
    assert settings is not None
    shape = (args.batch_size, args.size, args.size, 3)
    images = jax.device_put(random.integers(0, 256, shape, np.uint8))
    augment = jax.jit(lambda key, images: randaugment_batch(key, images, settings))
    times = []
    for key in jax.random.split(jax.random.key(0), 12):
        start = time.perf_counter()
        jax.block_until_ready(augment(key, images))
        times.append(time.perf_counter() - start)
    # The first ones are compiled.
    return 1e3 * float(np.median(times[2:]))


if __name__ == "__main__":
    main()
