"""Run every kernel once on odd small shapes, for NVIDIA's memory checkers.

    XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async compute-sanitizer --tool memcheck --kernel-name kns=ward
        --kernel-name kns=statistics --kernel-name kns=sums --kernel-name kns=moments
        --kernel-name kns=affine --kernel-name kns=gradient
        python -m cotnet_jax.tools.sanitize_kernels [--faults]

With this allocator the checker knows where every array ends; with the default one, and with
"platform", arrays lie in larger pieces, and a write behind one is not noticed. The kernels are
found by parts of their names: those of the aggregation end in "ward" but "statistics", those of the
poolings in "ward", and those of batch normalisation have all but "statistics". With ``--faults``
three kernels do wrong at the end:
``race_forward`` writes one word of shared memory from all threads, which racecheck must report,
and ``stray_forward`` and ``stray_sums`` write behind their arrays, which memcheck must report.
Without them nothing may be reported.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.command_line import Parser
from cotnet_jax.ops import pooling
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton.configs import CooperativeConfig
from cotnet_jax.tools import batch_norm_checks
from cotnet_jax.tools.batch_norm_checks import Case
from cotnet_jax.tools.check_kernels import make_operands, operations, require_kernels, select

IMAGES = 2
DTYPES = ("bfloat16", "float32")
# Of the aggregation, with a configuration for the cooperative kernels.
SHAPES = (
    (AggregationShape(5, 7, 1, 8, 8), CooperativeConfig(8, 2, 64, 2, False, resident=1)),
    (AggregationShape(4, 3, 2, 8, 6), CooperativeConfig(12, 4, 32, 1, True, resident=1)),
    (AggregationShape(3, 4, 2, 8, 4), CooperativeConfig(2, 3, 32, 1, False, resident=1)),
)
# Of batch normalisation: all options of the kernels, and for those of the products (bfloat16) all
# layouts. No number of pixels or channels is a multiple of a block's.
CASES = (
    Case(23, 25, 72),
    Case(23, 25, 24, activation="relu"),
    Case(23, 25, 24, activation="silu"),
    Case(23, 25, 24, activation="relu", residual=True),
    Case(23, 25, 40, activation="relu", residual=True, drops=True),
    Case(23, 25, 24, channels_in=40, reuses_x=True),
    Case(23, 25, 40, channels_in=200, activation="relu"),
    Case(23, 25, 24, channels_in=40, activation="relu", more=72),
    Case(23, 25, 56, channels_in=72, reuses_x=True, more=40),
    Case(23, 25, 40, channels_in=24, by_covariance=True),
    Case(23, 25, 120, channels_in=40, activation="relu", by_covariance=True),
    Case(23, 25, 72, channels_in=72, residual=True, drops=True, by_covariance=True),
    Case(23, 25, 200, channels_in=120, activation="relu", residual=True, by_covariance=True),
    Case(
        *(23, 25, 264, 200),
        activation="relu",
        residual=True,
        drops=True,
        reuses_x=True,
        by_covariance=True,
    ),
)
# Of the poolings, [N, H, W, C]. Neither pixels nor channels fill the last block.
IMAGES_TO_POOL = ((IMAGES, 23, 25, 24), (IMAGES, 14, 13, 136))


def run_kernels() -> None:
    """Run all kernels, in the dtypes that they take."""
    run_aggregation_kernels()
    run_batch_norm_kernels()
    run_pooling_kernels()


def run_aggregation_kernels() -> None:
    """Run the aggregation's kernels, in bfloat16 and float32."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton import configs, launch

    for shape, config in SHAPES:
        for dtype in DTYPES:
            operands = [jnp.asarray(a) for a in make_operands(IMAGES, shape, jnp.dtype(dtype))]
            for cooperative, reload in ((config, False), (None, False), (None, True)):
                if cooperative is not None and dtype == "float32":
                    continue  # the cooperative kernels take 16 bits

                def choose(*arguments, choose=configs.choose_config, reload=reload):
                    return dataclasses.replace(choose(*arguments), reload=reload)

                with (
                    mock.patch.object(launch, "cooperative_config", return_value=cooperative),
                    mock.patch.object(configs, "choose_config", choose),
                ):
                    for name, function in operations("triton").items():
                        run(function, *select(name, operands))
                        print(f"{shape} {dtype} {name} {cooperative}, {reload=}", flush=True)


def run_batch_norm_kernels() -> None:
    """Run batch normalisation's kernels, those of the sums in bfloat16 and float32.

    Small grids have each program read several blocks of rows.
    """
    # Importable only where there is a GPU.
    from cotnet_jax.ops.batch_norm.triton import covariance_launch, launch

    for case in CASES:
        for dtype in DTYPES:
            if case.channels_in and dtype == "float32":
                continue  # the kernels of the products take 16 bits
            operands = [
                jnp.asarray(a, dtype if a.ndim in (2, 4) else jnp.float32)
                for a in batch_norm_checks.make_operands(case, IMAGES, dtype)
            ]
            with (
                mock.patch.object(launch, "PROGRAMS", 2),
                mock.patch.object(launch, "PRODUCT", launch.PRODUCT._replace(programs=2)),
                mock.patch.object(covariance_launch, "PROGRAMS", 2),
            ):
                run(batch_norm_checks.make_function(case, "triton"), *operands)
            print(f"batch norm {case} {dtype}", flush=True)


def run_pooling_kernels() -> None:
    """Run the poolings' kernels, in bfloat16 and float32."""

    def gradient(function, x):
        y, pullback = jax.vjp(functools.partial(function, implementation="triton"), x)
        return pullback(y)

    for shape in IMAGES_TO_POOL:
        for dtype in DTYPES:
            x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
            for function in (pooling.max_pool, pooling.average_pool):
                run(functools.partial(gradient, function), x)
                print(f"{function.__name__} {shape} {dtype}", flush=True)


def run_faults() -> None:
    """Run three kernels that a memory checker must report."""
    import triton
    import triton.language as tl

    from cotnet_jax.ops.triton_call import call_kernel

    @triton.jit
    def race_forward(x_ptr, y_ptr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + lane)
        # The sum takes shared memory, whose first word all threads then write.
        total = tl.sum(x)
        x = tl.inline_asm_elementwise(
            "{ .reg .u32 a; mov.u32 a, 0; st.shared.u32 [a], $1; mov.u32 $0, $1; }",
            "=r,r",
            [x],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.store(y_ptr + lane, x + total)

    @triton.jit
    def stray_forward(x_ptr, y_ptr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        tl.store(y_ptr + lane + BLOCK, tl.load(x_ptr + lane))

    @triton.jit
    def stray_sums(x_ptr, y_ptr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        tl.store(y_ptr + lane + BLOCK, tl.load(x_ptr + lane))

    x = jnp.arange(128, dtype=jnp.int32)
    for kernel in (race_forward, stray_forward, stray_sums):
        name = kernel.fn.__name__
        print(f"{name}, to be reported", flush=True)
        jax.block_until_ready(call_kernel(kernel, 1, 4, (x,), [x], name=name, BLOCK=x.size))


def run(function: Callable, *operands: jax.Array) -> None:
    """Run a compiled function to its end."""
    jax.block_until_ready(jax.jit(function)(*operands))


def main(arguments: list[str]) -> None:
    module = "python -m cotnet_jax.tools.sanitize_kernels"
    checker = "compute-sanitizer --tool"
    parts = ("ward", "statistics", "sums", "moments", "affine", "gradient")
    filters = " ".join(f"--kernel-name kns={part}" for part in parts)
    parser = Parser(
        "Run every kernel once, for NVIDIA's memory checkers.",
        [
            f"XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async {checker} memcheck {filters} {module}",
            f"{checker} racecheck {module}",
            f"{checker} racecheck {module} --faults",
        ],
    )
    parser.add_argument(
        "--faults", action="store_true", help="Run three kernels that do wrong too."
    )
    options = parser.parse_args(arguments)
    require_kernels(parser)
    run_kernels()
    if options.faults:
        run_faults()


if __name__ == "__main__":
    main(sys.argv[1:])
