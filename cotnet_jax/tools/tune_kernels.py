"""Measure configurations for the aggregation kernels on this machine's GPU, and write its file.

    python -m cotnet_jax.tools.tune_kernels [--batch_size=512] [--workers=8]
        [--kernels=forward,backward] [--dtypes=bfloat16,float32] [--shapes=56x1x64,28x1x128]

Every candidate runs on random data, and the fastest of each kernel, shape and dtype is written to
the JSON file of this GPU in ``ops/local_aggregation/triton/tuned``; those of the cooperative
kernels only where they are faster than the two kernels that they replace. What is not measured
stays as it was, or for a GPU without a file as on the nearest GPU. The workers compile side by
side, and when all are done they measure, one after the other. There are some 4,500 candidates a
dtype; on 16 processor cores 1,367 of them were compiled in 4 minutes, and on an H100 ten are
measured in 2 seconds.
"""

import collections
import functools
import itertools
import math
import multiprocessing
import os
import queue
import sys
import time
from unittest import mock

from cotnet_jax.command_line import Parser, positive
from cotnet_jax.ops import dispatch
from cotnet_jax.ops.local_aggregation import shapes
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton import configs, tuned_configs
from cotnet_jax.ops.local_aggregation.triton.configs import (
    CONFIG_CLASSES,
    IN_PLACE_OF,
    AggregationConfig,
    Config,
    CooperativeConfig,
    NormalizationConfig,
    possible_parts,
    smallest_block,
    table_key,
)
from cotnet_jax.tools import benchmark_ops

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

# A kernel's name in the table, bytes of a weight, and the shape.
Job = tuple[str, int, AggregationShape]


def candidates(kernel: str, itemsize: int, shape: AggregationShape):
    """Yield the configurations worth a measurement."""
    config_class = CONFIG_CLASSES[kernel]
    if config_class is NormalizationConfig:
        return _normalization_configs(kernel, itemsize, shape)
    if config_class is CooperativeConfig:
        return _cooperative_configs(kernel, itemsize, shape)
    return _aggregation_configs(kernel, itemsize, shape)


def _normalization_configs(kernel, itemsize, shape):
    smallest = smallest_block(kernel, shape.groups, shape.channels, shape.taps)
    for block, each, stages in itertools.product((512, 1024, 2048, 4096), (8, 16, 32), (2, 3, 4)):
        warps = block // (32 * each)
        shared = (stages - 1) * block * itemsize * (2 if kernel == "group_norm_backward" else 1)
        if block >= smallest and warps >= 1 and shared <= LARGEST_SHARED:
            yield NormalizationConfig(block, warps, stages)


def _cooperative_configs(kernel, itemsize, shape):
    if itemsize != 2:
        return
    size, channels, whole = shape.h, shape.channels, shape.groups * shape.channels
    slices = [whole, *(c for c in (8, 16, 24, 32) if c < whole and channels % c == 0)]
    backward = kernel == "cooperative_backward"
    chunks = range(math.ceil(size / 8), math.ceil(size / 6) + 1)
    rows = sorted({math.ceil(size / n) for n in chunks} | ({14} & {size} if backward else set()))
    each_of = itertools.product(slices, rows, ((64, 1), (128, 2)), (False, True))
    for some, r, (block, warps), prefetch in each_of:
        programs = CooperativeConfig(some, r, block, warps, prefetch, 1).programs(size, size)
        # Small cooperative groups waste lanes, and large ones of many slices time.
        if some < whole and (programs > 4 or programs * r * block > 1.3 * size * size * some):
            continue
        # Words that ``cooperative_kernels`` keeps for each lane.
        words = (r + 2) * 9 if backward else r * 6
        if 4 * words * block <= LARGEST_SHARED:
            for resident in (8 // warps, 4 // warps) if backward else (1,):
                yield CooperativeConfig(some, r, block, warps, prefetch, resident)


def _aggregation_configs(kernel, itemsize, shape):
    size = shape.h
    rows = sorted({math.ceil(size / chunks) for chunks in (1, 2, 4, 8)} - set(range(1, 7)))
    if "backward" in kernel:
        lanes = ((1, 1), (1, 2), (2, 2), (2, 4))
        ahead = (False, True)
    else:
        lanes = ((1, 2), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8))
        ahead = (False,) if kernel == "forward" else (False, True)
    # Small images make few programs: these may be smaller too.
    warps = (1, 2) if size < 14 else (1, 2, 4)
    reload = (False, True) if kernel == "normalized_forward" else (False,)
    each_of = itertools.product(lanes, rows[-3:], warps, ahead, reload)
    for (parts, each), r, w, prefetch, again in each_of:
        block = 32 * w * each
        possible = possible_parts(kernel, parts, block, shape.share, shape.channels)
        if each * itemsize <= 16 and possible:
            yield AggregationConfig(parts, r, block, w, prefetch, again)


def call_with_config(kernel: str, config: Config):
    """Return the function that calls ``kernel`` with ``config``, to be traced."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton import launch

    function = getattr(launch, CALLS.get(kernel, kernel))
    function = getattr(function, "__wrapped__", function)
    if kernel in ("statistics", "cooperative_forward"):
        function = functools.partial(function, epsilon=EPSILON)
    if kernel in IN_PLACE_OF:
        return functools.partial(function, config=config)

    # A new function each time, so that nothing traced with another config is used again.
    def call(*operands):
        choose = "choose_config"
        if CONFIG_CLASSES[kernel] is NormalizationConfig:
            choose = "choose_normalization_config"
        with mock.patch.object(configs, choose, lambda *_: config):
            return function(*operands)

    return call


def fits(config: CooperativeConfig, shape: AggregationShape) -> bool:
    """Return whether a whole cooperative group runs on this GPU at once."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton.launch import gpu

    return config.programs(shape.h, shape.w) <= gpu().multiprocessors


def work(batch: int, bundles: list, compiled, turn, results) -> None:
    """Compile, and in its turn measure, bundles of candidates: a job and configurations."""
    programs = []
    for job, some in bundles:
        kernel, itemsize, shape = job
        name = CALLS.get(kernel, kernel)
        sets = benchmark_ops.input_sets(name, batch, shape, DTYPES[itemsize])
        each = {}
        for config in some:
            if kernel in IN_PLACE_OF and not fits(config, shape):
                continue
            each[config] = benchmark_ops.compile_repeated(call_with_config(kernel, config), sets)
        programs.append((job, sets, each))
        results.put((job, None))
    compiled.wait()
    with turn:
        for job, sets, each in programs:
            data = benchmark_ops.fill(sets)
            times = {
                config: benchmark_ops.time_repeated(program, data, 0.012, 3) * 1e6
                for config, program in each.items()
            }
            results.put((job, times))


def share_out(jobs, workers: int) -> list:
    """Return each worker's bundles, with about as many candidates for each."""
    bundles = []
    for job in jobs:
        some = list(candidates(*job))
        bundles += [(job, some[i : i + BUNDLE]) for i in range(0, len(some), BUNDLE)]
    shares: list[list] = [[] for _ in range(min(workers, len(bundles)))]
    for bundle in sorted(bundles, key=lambda bundle: -len(bundle[1])):
        min(shares, key=lambda share: sum(len(some) for _, some in share)).append(bundle)
    return shares


def measure(batch: int, shares: list):
    """Yield jobs with times in microseconds by configuration, as they come, and print progress."""
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
        what = "compiled" if times is None else f"{label(job)} measured"
        passed = f"{time.monotonic() - start:.0f} s"
        print(f"{done % count + 1}/{count} bundles {what}; {passed}", flush=True)
        if times is not None:
            yield job, times
    for process in processes:
        process.join()


def next_result(results, processes):
    """Return what a worker puts into the queue next; end the program where one failed."""
    while True:
        try:
            return results.get(timeout=5)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                sys.exit("error: a worker failed; its message is above")


def label(job: Job) -> str:
    """Return a job in words."""
    kernel, itemsize, shape = job
    return f"{kernel} {DTYPES[itemsize]} {shape_name(shape)}"


def shape_name(shape: AggregationShape) -> str:
    """Return a shape as the option has it: H x groups x channels."""
    return f"{shape.h}x{shape.groups}x{shape.pixel_values}"


def choose(table: dict, times: dict) -> dict:
    """Put the fastest configuration of every job into the table; return them with their times."""
    best = {job: min(each.items(), key=lambda item: item[1]) for job, each in times.items()}
    for job, (config, duration) in best.items():
        kernel, *which = job
        table[kernel].pop(table_key(*job), None)
        others = [(other, *which) for other in IN_PLACE_OF.get(kernel, ())]
        if all(other in best for other in others):
            apart = sum(best[other][1] for other in others)
            if not others or duration < apart:
                table[kernel][table_key(*job)] = config
    return best


def parse_options(arguments: list[str]):
    """Return the options, with the kernels, dtypes and shapes that they name."""
    command = "python -m cotnet_jax.tools.tune_kernels"
    parser = Parser(
        "Measure configurations for the aggregation kernels on this machine's GPU.",
        [
            f"{command} --workers=16",
            f"{command} --kernels=forward,backward --dtypes=bfloat16",
            f"{command} --shapes=56x1x64,28x1x128 --log=times.txt",
        ],
    )
    parser.add_argument(
        "--batch_size", type=positive, default=512, metavar="N", help="Images; default %(default)s."
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=8,
        metavar="N",
        help="Processes that compile; default %(default)s.",
    )
    for option, known, metavar in (
        ("--kernels", list(CONFIG_CLASSES), "NAME,..."),
        ("--dtypes", list(DTYPES.values()), "NAME,..."),
        ("--shapes", [shape_name(shape) for shape in shapes.SHAPES], "HxGxC,..."),
    ):
        parser.add_argument(
            option,
            type=benchmark_ops.by_comma(known),
            default=known,
            metavar=metavar,
            help=f"Of {', '.join(known)}; default all.",
        )
    parser.add_argument("--log", default="", metavar="FILE", help="Where all times go.")
    options = parser.parse_args(arguments)
    for kernel, others in IN_PLACE_OF.items():
        if kernel in options.kernels and not set(options.kernels).issuperset(others):
            parser.error(f"--kernels: {kernel} is compared with {' and '.join(others)}; add them")
    return options


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    # The workers share the GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not dispatch.kernel_available():
        sys.exit(f"error: no kernels to tune: they need an NVIDIA GPU and {dispatch.INSTALL}")
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton.launch import gpu

    print(tuned_configs.describe(gpu()))
    table = {kernel: dict(known) for kernel, known in tuned_configs.nearest(gpu()).table.items()}
    itemsizes = [itemsize for itemsize, dtype in DTYPES.items() if dtype in options.dtypes]
    some = [shape for shape in shapes.SHAPES if shape_name(shape) in options.shapes]
    jobs = itertools.product(options.kernels, itemsizes, some)
    times: dict[Job, dict[Config, float]] = collections.defaultdict(dict)
    with open(options.log or os.devnull, "w", buffering=1) as log:
        for job, each in measure(options.batch_size, share_out(jobs, options.workers)):
            times[job].update(each)
            for config, duration in each.items():
                log.write(f"{label(job)} {config} {duration:.1f}\n")
    for job, (config, duration) in choose(table, times).items():
        slowest = max(times[job].values())
        chosen = "" if table_key(*job) in table[job[0]] else ", slower than apart"
        print(f"{label(job)}: {config} {duration:.1f} us, slowest {slowest:.1f}{chosen}")
    path = tuned_configs.FOLDER / f"{gpu().name}.json"
    tuned_configs.write(tuned_configs.TunedConfigs(gpu(), table), path)
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
