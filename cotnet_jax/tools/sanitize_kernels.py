"""Run every aggregation kernel once on odd small shapes, for NVIDIA's memory checkers.

    XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async compute-sanitizer --tool memcheck --kernel-name kns=ward
        --kernel-name kns=statistics python -m cotnet_jax.tools.sanitize_kernels [--faults]

With this allocator the checker knows where every array ends; with the default one, and with
"platform", arrays lie in larger pieces, and a write behind one is not noticed. The kernels are
found by their names: all end in "ward" but "statistics". With ``--faults`` two kernels do wrong
at the end: ``race_forward`` writes one word of shared memory from all threads, which racecheck
must report, and ``stray_forward`` writes behind its array, which memcheck must report. Without
them nothing may be reported.
"""

import dataclasses
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from cotnet_jax.command_line import Parser
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton.configs import CooperativeConfig
from cotnet_jax.tools.check_kernels import make_operands, operations, require_kernels, select

IMAGES = 2
# With a configuration for the cooperative kernels.
SHAPES = (
    (AggregationShape(5, 7, 1, 8, 8), CooperativeConfig(8, 2, 64, 2, False, resident=1)),
    (AggregationShape(4, 3, 2, 8, 6), CooperativeConfig(12, 4, 32, 1, True, resident=1)),
    (AggregationShape(3, 4, 2, 8, 4), CooperativeConfig(2, 3, 32, 1, False, resident=1)),
)


def run_kernels() -> None:
    """Run all kernels, in bfloat16 and float32."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton import configs, launch

    for shape, config in SHAPES:
        for dtype in ("bfloat16", "float32"):
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
                        jax.block_until_ready(jax.jit(function)(*select(name, operands)))
                        print(f"{shape} {dtype} {name} {cooperative}, {reload=}", flush=True)


def run_faults() -> None:
    """Run two kernels that a memory checker must report."""
    import triton
    import triton.language as tl

    from cotnet_jax.ops.local_aggregation.triton import launch

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

    x = jnp.arange(128, dtype=jnp.int32)
    for kernel in (race_forward, stray_forward):
        print(f"{kernel.fn.__name__}, to be reported", flush=True)
        jax.block_until_ready(launch.call_kernel(kernel, 1, 4, (x,), [x], BLOCK=x.size))


def main(arguments: list[str]) -> None:
    module = "python -m cotnet_jax.tools.sanitize_kernels"
    checker = "compute-sanitizer --tool"
    parser = Parser(
        "Run every aggregation kernel once, for NVIDIA's memory checkers.",
        [
            f"XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async {checker} memcheck --kernel-name kns=ward "
            f"--kernel-name kns=statistics {module}",
            f"{checker} racecheck {module}",
            f"{checker} racecheck {module} --faults",
        ],
    )
    parser.add_argument("--faults", action="store_true", help="Run two kernels that do wrong too.")
    options = parser.parse_args(arguments)
    require_kernels(parser)
    run_kernels()
    if options.faults:
        run_faults()


if __name__ == "__main__":
    main(sys.argv[1:])
