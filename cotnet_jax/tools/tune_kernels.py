"""Measures tiles for the aggregation kernels on this machine's GPU and rewrites their table.

    python -m cotnet_jax.tools.tune_kernels [--batch=512] [--workers=8] [--kernels=forward,backward]
        [--dtypes=bfloat16,float32] [--shapes=56x1x64,28x1x128]

Every candidate runs on random data, and the fastest of each kernel, shape and dtype is written to
tuned_h100.py beside the kernels; kernels that normalise and aggregate only where they are
faster than the two that they replace. The workers compile side by side, and when all are done
they measure, one after the other. There are some 4,500 candidates a dtype; on 16 processor cores
1,367 of them were compiled in 4 minutes, and on an H100 ten are measured in 2 seconds.
"""

import argparse
import collections
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import queue
import sys
import time

from cotnet_jax.ops.local_aggregation.triton import tuned_h100
from cotnet_jax.ops.local_aggregation.triton.configs import (
    IN_PLACE_OF,
    NormTile,
    TeamTile,
    Tile,
    possible_parts,
    smallest_block,
)
from cotnet_jax.tools import benchmark_ops

# The working sizes of the ten models at their input sizes: H = W, groups, channels of the values.
SHAPES = (
    *((56, 1, 64), (28, 1, 128), (14, 1, 256), (7, 1, 512)),
    *((56, 2, 96), (28, 2, 192), (14, 2, 384), (7, 2, 768)),
    *((16, 1, 256), (8, 1, 512), (20, 1, 256), (10, 1, 512)),
)
SHARE = 8
AGGREGATIONS = ("forward", "backward", "normalized_forward", "normalized_backward")
NORMALIZATIONS = ("statistics", "group_norm_backward")
KERNELS = (*AGGREGATIONS, *NORMALIZATIONS, *IN_PLACE_OF)
DTYPES = {2: "bfloat16", 4: "float32"}
# Functions of ``launch`` that call the kernels, where they have other names.
CALLS = {
    "normalized_forward": "aggregate_normalized",
    "normalized_backward": "aggregation_backward",
}
EPSILON = 1e-5
# Bytes of shared memory of a program that any GPU has, less what Triton may take besides.
LARGEST_SHARED = 46 * 1024
# Candidates that a worker compiles and measures at a time.
BUNDLE = 12


def candidates(kernel: str, size: int, groups: int, channels: int, itemsize: int):
    """Tiles worth a measurement for a picture of ``size`` and ``channels`` weight channels."""
    if kernel in NORMALIZATIONS:
        return _norm_tiles(kernel, groups, channels, itemsize)
    if kernel in IN_PLACE_OF:
        return _team_tiles(kernel, size, groups * channels, channels, itemsize)
    return _tiles(kernel, size, channels, itemsize)


def _norm_tiles(kernel, groups, channels, itemsize):
    smallest = smallest_block(kernel, groups, channels, 9)
    for block, each, stages in itertools.product((512, 1024, 2048, 4096), (8, 16, 32), (2, 3, 4)):
        warps = block // (32 * each)
        shared = (stages - 1) * block * itemsize * (2 if kernel == "group_norm_backward" else 1)
        if block >= smallest and warps >= 1 and shared <= LARGEST_SHARED:
            yield NormTile(block, warps, stages)


def _team_tiles(kernel, size, whole, channels, itemsize):
    if itemsize != 2:
        return
    slices = [whole, *(c for c in (8, 16, 24, 32) if c < whole and channels % c == 0)]
    backward = kernel == "team_backward"
    chunks = range(math.ceil(size / 8), math.ceil(size / 6) + 1)
    rows = sorted({math.ceil(size / n) for n in chunks} | ({14} & {size} if backward else set()))
    each_of = itertools.product(slices, rows, ((64, 1), (128, 2)), (False, True))
    for some, r, (block, warps), prefetch in each_of:
        members = TeamTile(some, r, block, warps, prefetch, 1).members(size, size)
        # Small teams waste lanes, and large ones of many slices time.
        if some < whole and (members > 4 or members * r * block > 1.3 * size * size * some):
            continue
        # Words that ``cooperative_kernels`` keeps for each lane.
        words = (r + 2) * 9 if backward else r * 6
        if 4 * words * block <= LARGEST_SHARED:
            for resident in (8 // warps, 4 // warps) if backward else (1,):
                yield TeamTile(some, r, block, warps, prefetch, resident)


def _tiles(kernel, size, channels, itemsize):
    rows = sorted({math.ceil(size / chunks) for chunks in (1, 2, 4, 8)} - set(range(1, 7)))
    if "backward" in kernel:
        shapes = ((1, 1), (1, 2), (2, 2), (2, 4))
        ahead = (False, True)
    else:
        shapes = ((1, 2), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8))
        ahead = (False,) if kernel == "forward" else (False, True)
    # Small pictures make few programs: these may be smaller too.
    warps = (1, 2) if size < 14 else (1, 2, 4)
    reload = (False, True) if kernel == "normalized_forward" else (False,)
    each_of = itertools.product(shapes, rows[-3:], warps, ahead, reload)
    for (parts, each), r, w, prefetch, again in each_of:
        block = 32 * w * each
        if each * itemsize <= 16 and possible_parts(kernel, parts, block, SHARE, channels):
            yield Tile(parts, r, block, w, prefetch, again)


def table_key(kernel: str, itemsize: int, size: int, groups: int, channels: int) -> tuple:
    """Where the table has the tile of a shape."""
    share = () if kernel in NORMALIZATIONS else (SHARE,)
    return (itemsize, size, size, groups, *share, channels)


def job_key(job) -> tuple:
    """``table_key`` of a kernel, bytes of a weight, and shape."""
    kernel, itemsize, (size, groups, width) = job
    return table_key(kernel, itemsize, size, groups, width // groups // SHARE)


def call_in_tile(kernel: str, key: tuple, tile):
    """The function that calls ``kernel``, working in ``tile`` while it is traced."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton import launch

    function = getattr(launch, CALLS.get(kernel, kernel))
    function = getattr(function, "__wrapped__", function)
    if kernel in ("statistics", "team_forward"):
        function = functools.partial(function, epsilon=EPSILON)
    if kernel in IN_PLACE_OF:
        return functools.partial(function, tile=tile)
    tuned_h100.TABLE[kernel][key] = tuple(vars(tile).values())
    # A new function each time, so that nothing traced with another tile is used again.
    return functools.partial(function)


def fits(tile: TeamTile, size: int) -> bool:
    """Whether a whole team runs on this GPU at once."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton.launch import multiprocessors

    return tile.members(size, size) <= multiprocessors()


def work(batch: int, bundles: list, compiled, turn, results) -> None:
    """Compiles, and in its turn measures, bundles of tiles: (kernel, itemsize, shape), tiles."""
    programs = []
    for job, tiles in bundles:
        kernel, itemsize, (size, groups, width) = job
        name = CALLS.get(kernel, kernel)
        sets = benchmark_ops.input_sets(name, batch, size, groups, width, DTYPES[itemsize])
        each = {}
        for tile in tiles:
            if kernel in IN_PLACE_OF and not fits(tile, size):
                continue
            call = call_in_tile(kernel, job_key(job), tile)
            each[tile] = benchmark_ops.compile_repeated(call, sets)
        programs.append((job, sets, each))
        results.put((job, None))
    compiled.wait()
    with turn:
        for job, sets, each in programs:
            data = benchmark_ops.fill(sets)
            times = {
                tile: benchmark_ops.time_repeated(program, data, 0.012, 3) * 1e6
                for tile, program in each.items()
            }
            results.put((job, times))


def share_out(jobs, workers: int) -> list:
    """Each worker's bundles, with about as many candidates for each."""
    bundles = []
    for job in jobs:
        kernel, itemsize, (size, groups, width) = job
        tiles = list(candidates(kernel, size, groups, width // groups // SHARE, itemsize))
        bundles += [(job, tiles[i : i + BUNDLE]) for i in range(0, len(tiles), BUNDLE)]
    shares = [[] for _ in range(min(workers, len(bundles)))]
    for bundle in sorted(bundles, key=lambda bundle: -len(bundle[1])):
        min(shares, key=lambda share: sum(len(tiles) for _, tiles in share)).append(bundle)
    return shares


def measure(batch: int, shares: list):
    """Yields jobs with times in microseconds by tile, as they come; tells how far it is."""
    context = multiprocessing.get_context("spawn")
    compiled, turn, results = context.Barrier(len(shares)), context.Lock(), context.Queue()
    processes = [
        context.Process(target=work, args=(batch, share, compiled, turn, results), daemon=True)
        for share in shares
    ]
    count = sum(map(len, shares))
    start = time.monotonic()
    for process in processes:
        process.start()
    for done in range(2 * count):
        job, times = next_result(results, processes)
        what = "compiled" if times is None else f"{job[0]} {job_key(job)} measured"
        passed = f"{time.monotonic() - start:.0f} s"
        print(f"{done % count + 1}/{count} bundles {what}; {passed}", flush=True)
        if times is not None:
            yield job, times
    for process in processes:
        process.join()


def next_result(results, processes):
    """What a worker puts into the queue next; ends the program where one failed."""
    while True:
        try:
            return results.get(timeout=5)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                sys.exit("error: a worker failed; its message is above")


def choose(table: dict, times: dict) -> dict:
    """The table with the fastest tile of every job, and times of the fastest."""
    best = {job: min(each.items(), key=lambda item: item[1]) for job, each in times.items()}
    for job, (tile, duration) in best.items():
        kernel, *shape = job
        table[kernel].pop(job_key(job), None)
        others = [(other, *shape) for other in IN_PLACE_OF.get(kernel, ())]
        if all(other in best for other in others):
            apart = sum(best[other][1] for other in others)
            if not others or duration < apart:
                table[kernel][job_key(job)] = tuple(vars(tile).values())
    return best


def write(table: dict) -> None:
    """Writes the table's module."""
    lines = [f'"""{tuned_h100.__doc__}"""', "", "TABLE = {"]
    for kernel in KERNELS:
        lines.append(f'    "{kernel}": {{')
        lines += [f"        {key}: {tile}," for key, tile in sorted(table[kernel].items())]
        lines.append("    },")
    lines.append("}")
    pathlib.Path(tuned_h100.__file__).write_text("\n".join(lines) + "\n")


def parse_options(arguments: list[str]):
    """Options, with the kernels, itemsizes and shapes that they name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["x".join(map(str, shape)) for shape in SHAPES]
    parser.add_argument("--batch", type=int, default=512, help="pictures")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="only these, by comma")
    parser.add_argument("--dtypes", default=",".join(DTYPES.values()), help="only these, by comma")
    parser.add_argument("--shapes", default=",".join(names), help="H x groups x channels, by comma")
    parser.add_argument("--log", default="", help="file for all times")
    options = parser.parse_args(arguments)
    for option, known in (("kernels", KERNELS), ("dtypes", DTYPES.values()), ("shapes", names)):
        given = getattr(options, option).split(",")
        if unknown := set(given) - set(known):
            some = ", ".join(sorted(unknown))
            parser.error(f"--{option}: no {some}; there are {', '.join(known)}")
        setattr(options, option, given)
    kernels = set(options.kernels)
    for kernel, others in IN_PLACE_OF.items():
        if kernel in kernels and not kernels.issuperset(others):
            parser.error(f"--kernels: {kernel} is compared with {' and '.join(others)}; add them")
    return options


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    # The workers share the GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    table = tuned_h100.TABLE
    itemsizes = [itemsize for itemsize, dtype in DTYPES.items() if dtype in options.dtypes]
    shapes = [shape for shape in SHAPES if "x".join(map(str, shape)) in options.shapes]
    jobs = itertools.product(options.kernels, itemsizes, shapes)
    times = collections.defaultdict(dict)
    with open(options.log or os.devnull, "w", buffering=1) as log:
        for job, each in measure(options.batch, share_out(jobs, options.workers)):
            times[job].update(each)
            for tile, duration in each.items():
                fields = tuple(vars(tile).values())
                log.write(f"{job[0]} {job_key(job)} {fields} {duration:.1f}\n")
    for job, (tile, duration) in choose(table, times).items():
        slowest = max(times[job].values())
        chosen = "" if job_key(job) in table[job[0]] else ", slower than apart"
        print(f"{job[0]} {job_key(job)}: {tile} {duration:.1f} us, slowest {slowest:.1f}{chosen}")
    write(table)


if __name__ == "__main__":
    main(sys.argv[1:])
