"""Measures tiles for the aggregation kernels on this machine's GPU and rewrites their table.

    python -m cotnet_jax.tune_aggregation [--batch=512] [--workers=8] [--kernels=forward,backward]
        [--dtypes=bfloat16,float32]

Every candidate runs on random data, and the fastest of each kernel, shape and dtype is written to
cotnet_jax/layers/aggregation_tile_table.py. Workers compile side by side and take turns at the
GPU. With 16 processor cores and an H200 it took 3 minutes.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import sys
import time

# The working sizes of the ten models at their input sizes: H = W, groups, channels of the values.
SHAPES = (
    *((56, 1, 64), (28, 1, 128), (14, 1, 256), (7, 1, 512)),
    *((56, 2, 96), (28, 2, 192), (14, 2, 384), (7, 2, 768)),
    *((16, 1, 256), (8, 1, 512), (20, 1, 256), (10, 1, 512)),
)
SHARE = 8
AGGREGATIONS = ("forward", "backward", "normalized_forward", "normalized_backward")
NORMALIZATIONS = ("statistics", "group_norm_backward")
KERNELS = AGGREGATIONS + NORMALIZATIONS
DTYPES = {2: "bfloat16", 4: "float32"}


def candidates(kernel: str, size: int, groups: int, channels: int, itemsize: int):
    """Tiles worth a measurement for a picture of ``size`` and ``channels`` weight channels."""
    from cotnet_jax.layers.aggregation_tiles import NormTile, Tile, possible_parts, smallest_block

    if kernel in NORMALIZATIONS:
        blocks = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
        for (block, warps), ahead in itertools.product(blocks, (1, 2, 4)):
            if block >= smallest_block(kernel, groups, channels, 9):
                yield NormTile(block, warps, ahead)
        return
    rows = sorted({math.ceil(size / chunks) for chunks in (1, 2, 4, 8)} - set(range(1, 7)))
    if "backward" in kernel:
        shapes = ((1, 1), (1, 2), (2, 2), (2, 4))
        ahead = (False, True)
    else:
        shapes = ((1, 2), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8))
        ahead = (False,)
    # Small pictures make few programs: these may be smaller too.
    warps = (1, 2) if size < 14 else (2, 4)
    for (parts, each), r, w, prefetch in itertools.product(shapes, rows[-3:], warps, ahead):
        block = 32 * w * each
        if each * itemsize <= 16 and possible_parts(kernel, parts, block, SHARE, channels):
            yield Tile(parts, r, block, w, prefetch)


def table_key(kernel: str, itemsize: int, size: int, groups: int, channels: int) -> tuple:
    """Where the table has the tile of a shape."""
    share = () if kernel in NORMALIZATIONS else (SHARE,)
    return (itemsize, size, size, groups, *share, channels)


def measure(batch: int, lock, job) -> tuple:
    """The fastest tile of one kernel, shape and dtype, with all times in microseconds."""
    kernel, itemsize, (size, groups, width) = job

    from cotnet_jax import benchmark
    from cotnet_jax.layers import aggregation_tile_table as table
    from cotnet_jax.layers import aggregation_triton

    channels = width // groups // SHARE
    key = table_key(kernel, itemsize, size, groups, channels)
    with lock:
        arguments = benchmark.make_inputs(kernel, batch, size, groups, width, DTYPES[itemsize])
    functions = {
        "forward": aggregation_triton.forward.__wrapped__,
        "backward": aggregation_triton.backward.__wrapped__,
        "normalized_forward": aggregation_triton.normalized_forward.__wrapped__,
        "normalized_backward": aggregation_triton.aggregation_backward,
        "statistics": functools.partial(aggregation_triton.statistics.__wrapped__, epsilon=1e-5),
        "group_norm_backward": aggregation_triton.group_norm_backward,
    }
    times = {}
    for tile in candidates(kernel, size, groups, channels, itemsize):
        # A new function each time, so that nothing traced with another tile is used again.
        table.TABLE[kernel][key] = tuple(vars(tile).values())
        call = functools.partial(functions[kernel])
        repeated = benchmark.compile_repeated(call, arguments)
        with lock:
            times[tile] = benchmark.time_repeated(repeated, arguments, 0.004, 3) * 1e6
    best = min(times, key=times.get)
    return kernel, key, tuple(vars(best).values()), times


def write(table: dict) -> None:
    """Writes the table's module."""
    from cotnet_jax.layers import aggregation_tile_table as module

    lines = [f'"""{module.__doc__}"""', "", "TABLE = {"]
    for kernel in KERNELS:
        lines.append(f'    "{kernel}": {{')
        lines += [f"        {key}: {tile}," for key, tile in sorted(table[kernel].items())]
        lines.append("    },")
    lines.append("}")
    pathlib.Path(module.__file__).write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512, help="pictures")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="only these, by comma")
    parser.add_argument("--dtypes", default=",".join(DTYPES.values()), help="only these, by comma")
    parser.add_argument("--log", default="", help="file for all times")
    options = parser.parse_args(arguments)
    kernels, dtypes = options.kernels.split(","), options.dtypes.split(",")
    if unknown := set(kernels) - set(KERNELS):
        parser.error(f"--kernels: no {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    if unknown := set(dtypes) - set(DTYPES.values()):
        parser.error(
            f"--dtypes: no {', '.join(sorted(unknown))}; there are {', '.join(DTYPES.values())}"
        )
    # The workers share the GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    from cotnet_jax.layers import aggregation_tile_table

    table = aggregation_tile_table.TABLE
    itemsizes = [itemsize for itemsize, dtype in DTYPES.items() if dtype in dtypes]
    for kernel in kernels:
        kept = {key: tile for key, tile in table[kernel].items() if key[0] not in itemsizes}
        table[kernel] = kept
    jobs = list(itertools.product(kernels, itemsizes, SHAPES))
    jobs.sort(key=lambda job: ("backward" not in job[0], -job[2][0]))
    context = multiprocessing.get_context("spawn")
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(context.Manager()).Lock()
        log = stack.enter_context(open(options.log or os.devnull, "w"))
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context)
        )
        futures = [pool.submit(measure, options.batch, lock, job) for job in jobs]
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            kernel, key, tile, times = future.result()
            table[kernel][key] = tile
            for candidate, duration in sorted(times.items(), key=lambda item: item[1]):
                log.write(f"{kernel} {key} {tuple(vars(candidate).values())} {duration:.1f}\n")
            passed = time.monotonic() - start
            left = passed / done * (len(jobs) - done)
            print(
                f"{done}/{len(jobs)} {kernel} {key}: {tile} {min(times.values()):.1f} us, "
                f"slowest {max(times.values()):.1f} us; {passed:.0f} s, about {left:.0f} s left",
                flush=True,
            )
    write(table)


if __name__ == "__main__":
    main(sys.argv[1:])
