"""Measure the speed of whole models on this machine: training steps, and inference.

    python -m cotnet_jax.tools.benchmark_model train [--models=cotnet50,...] [--batch_sizes=640,128]
    python -m cotnet_jax.tools.benchmark_model infer [--batch_sizes=512,1] [--implementation=xla]

One line for each model and batch size, in bfloat16 on GPUs and TPUs and in float32 on CPUs, on
noise that stays on the device. A training step is the recipe's, with mixing and EMA. Where memory
does not suffice half of the batch is tried, and the line says so.

The columns are milliseconds, images a second, GiB of the program, seconds of tracing (with
compiling the Triton kernels) and of compiling, TFLOP/s and GB of memory traffic by XLA's own count,
which leaves out convolutions and kernels, and launches. On GPUs a second line has the milliseconds
of each kind of kernel. --csv appends everything to a file.
"""

import csv
import dataclasses
import functools
import gc
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cotnet_jax.command_line import Parser, positive, positives
from cotnet_jax.configs import default
from cotnet_jax.models.cotnet import list_models
from cotnet_jax.ops.compile_kernels import lower
from cotnet_jax.tools import benchmark_step
from cotnet_jax.tools.benchmark_ops import by_comma
from cotnet_jax.training.loop import build_optimizer
from cotnet_jax.training.out_of_memory import is_out_of_memory
from cotnet_jax.training.setup import TrainSetup
from cotnet_jax.training.state import create_train_state

SECONDS, ROUNDS = 1.0, 5
BATCH_SIZES = {"train": [640, 128], "infer": [512, 1]}
# Kinds of GPU kernels, by their names; the first that fits.
KINDS = {
    "ours": (
        "cooperative_|residual_|backward_sums|channel_sums|statistics|^backward|^forward|moments|"
        "affine|gradient_products|input_gradient"
    ),
    "convolution": "cudnn|cutlass|xmma|nvjet|implicit_gemm|nhwc|wgrad|dgrad|gemm|splitK",
    "reduction": "reduce",
    "copy": "copy|transpose|concatenate|memcpy|memset|slice",
    "elementwise": "",
}


@dataclasses.dataclass
class Row:
    """What was measured of a model; the fields are the columns of the CSV."""

    pass_: str
    model: str
    batch: int
    size: int
    dtype: str
    device: str
    jax: str
    ms: float
    images_per_s: float
    gib: float
    trace_s: float
    compile_s: float
    tflop_per_s: float
    gb: float
    launches: int
    kinds: dict[str, float]

    def values(self) -> dict[str, Any]:
        """Return the columns, with one for each kind of kernel in milliseconds."""
        columns = {key.rstrip("_"): value for key, value in vars(self).items() if key != "kinds"}
        return columns | {f"{kind}_ms": self.kinds.get(kind, 0.0) for kind in KINDS}


def set_up(model: str, size: int, implementation: str | None, batch: int | None) -> TrainSetup:
    """Return the recipe's setup for a model, with noise for its images.

    Without a batch, for inference, the configuration's own one stays, which nothing uses.
    """
    config = default.get_config()
    config.model.name = model
    config.batch_size = batch or config.batch_size
    config.data.image_size = size
    return with_implementation(benchmark_step.set_up_training(config), implementation)


def with_implementation(setup: TrainSetup, implementation: str | None) -> TrainSetup:
    """Return a setup whose model runs in one implementation, as in ``CoTNet``."""
    network = setup.model.clone(implementation=implementation)
    return dataclasses.replace(setup, eval=dataclasses.replace(setup.eval, model=network))


def trace_training(setup: TrainSetup) -> tuple[jax.stages.Traced, Callable[[], list]]:
    """Return the traced train step, and a function that makes its operands."""
    batch = benchmark_step.make_batch(setup)
    optimizer = build_optimizer(setup)
    return benchmark_step.trace_step(setup, batch), lambda: [
        create_train_state(setup, optimizer),
        batch,
    ]


def trace_inference(
    setup: TrainSetup, batch_size: int
) -> tuple[jax.stages.Traced, Callable[[], list]]:
    """Return the traced network in evaluation, and a function that makes its operands."""
    model, size = setup.model, setup.config.data.image_size
    shape = (batch_size, size, size, 3)

    @jax.jit
    def initialise(key):
        return model.init(key, jnp.zeros((1, *shape[1:]), model.dtype))

    def make():
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        return [initialise(jax.random.key(0)), jnp.asarray(noise, model.dtype)]

    variables = jax.eval_shape(initialise, jax.random.key(0))
    images = jax.ShapeDtypeStruct(shape, model.dtype)
    return jax.jit(model.apply).trace(variables, images), make


def measure(pass_: str, setup: TrainSetup, batch: int, kinds: Mapping[str, str] = KINDS) -> Row:
    """Compile and time one model; where there are several processes, each calls it.

    Args:
      batch: images, of all devices.
      kinds: of GPU kernels, each with a regular expression of their names; the first that fits.

    Raises:
      jax.errors.JaxRuntimeError: among others where memory does not suffice.
    """
    config = setup.config
    start = time.perf_counter()
    traced, make = trace_training(setup) if pass_ == "train" else trace_inference(setup, batch)
    lowered = lower(traced)
    traced_after = time.perf_counter()
    program = lowered.compile()
    compiled_after = time.perf_counter()
    operands = make()

    call = make_call(pass_, program, operands)

    def run(count: int) -> float:
        """Return the seconds of each of so many calls."""
        start = time.perf_counter()
        call(count)
        return (time.perf_counter() - start) / count

    run(2)
    # Each process counts as many calls as the first.
    count = int(multihost_utils.broadcast_one_to_all(np.int32(max(3, SECONDS / run(3)))))
    seconds = statistics.median(run(count) for _ in range(ROUNDS))
    taken_by, launches = profile(run, kinds) if jax.default_backend() == "gpu" else ({}, 0)
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    device = jax.devices()[0].device_kind
    return Row(
        pass_=pass_,
        model=config.model.name,
        batch=batch,
        size=config.data.image_size,
        dtype=setup.model.dtype.name,
        device=f"{jax.device_count()} x {device}",
        jax=jax.__version__,
        ms=seconds * 1e3,
        images_per_s=batch / seconds,
        gib=taken / 2**30,
        trace_s=traced_after - start,
        compile_s=compiled_after - traced_after,
        tflop_per_s=cost.get("flops", 0) / seconds / 1e12,
        gb=cost.get("bytes accessed", 0) / 1e9,
        launches=launches,
        kinds=taken_by,
    )


def make_call(
    pass_: str, program: Callable[..., Any], operands: list[Any]
) -> Callable[[int], None]:
    """Return a function that calls the program so many times, and waits for the last result."""

    def call(count: int) -> None:
        for _ in range(count):
            result = program(*operands)
            if pass_ == "train":
                # The state is donated.
                operands[0] = result[0]
        jax.block_until_ready(result)

    return call


def profile(
    run: Callable[[int], float], kinds: Mapping[str, str], calls: int = 3
) -> tuple[dict[str, float], int]:
    """Return the milliseconds of each kind of kernel in a call, and the number of launches.

    Both are sums over the devices of this process.
    """
    milliseconds: Counter[str] = Counter()
    launches = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(calls)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    for plane in data.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                kind = next(kind for kind, names in kinds.items() if re.search(names, event.name))
                milliseconds[kind] += event.duration_ns / 1e6 / calls
                launches += 1
    return dict(milliseconds), launches // calls


def measure_what_fits(
    pass_: str, make_setup: Callable[[int | None], TrainSetup], batch: int
) -> Row:
    """Measure with the largest batch that fits into memory: the one given, or half of it, ..."""
    while True:
        try:
            return measure(pass_, make_setup(batch if pass_ == "train" else None), batch)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
        print(f"batch {batch} does not fit into memory: trying {batch // 2}", flush=True)
        batch //= 2
        gc.collect()


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Append columns to a CSV file; make it, with its header, if it is not there."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, values)
        if new:
            writer.writeheader()
        writer.writerow(values)


HEADER = (
    f"{'model':20} {'batch':>5} {'ms':>8} {'images/s':>9} {'GiB':>6} {'trace':>6} {'compile':>7} "
    f"{'TFLOP/s':>8} {'GB':>7} {'launches':>8}"
)


def as_text(row: Row) -> str:
    """Return a line of the table, and on GPUs a second one."""
    text = (
        f"{row.model:20} {row.batch:5} {row.ms:8.2f} {row.images_per_s:9.0f} {row.gib:6.1f} "
        f"{row.trace_s:6.1f} {row.compile_s:7.1f} {row.tflop_per_s:8.2f} {row.gb:7.1f} "
        f"{row.launches:8}"
    )
    if row.kinds:
        each = ", ".join(f"{kind} {row.kinds.get(kind, 0):.1f}" for kind in KINDS)
        text += f"\n{'':20} ms of kernels: {each}"
    return text


def main(arguments: list[str]) -> None:
    command = "python -m cotnet_jax.tools.benchmark_model"
    parser = Parser(
        "Measure the speed of whole models on this machine.",
        [
            f"{command} train --models=cotnet50 --batch_sizes=640,128",
            f"{command} infer --models=cotnet50,se_cotnetd_50 --csv=infer.csv",
        ],
        notes="The module's docstring says what the columns are.",
    )
    every = list_models()
    parser.add_argument(
        "pass_",
        metavar="train|infer",
        nargs="?",
        choices=list(BATCH_SIZES),
        required=True,
        help="The recipe's training step, or the network in evaluation.",
    )
    parser.add_argument(
        "--models",
        type=by_comma(every),
        default=["cotnet50"],
        metavar="NAME,...",
        help="Default cotnet50.",
    )
    parser.add_argument(
        "--batch_sizes",
        type=positives,
        metavar="N,...",
        help="Images; default 640,128 for training and 512,1 for inference.",
    )
    parser.add_argument(
        "--size", type=positive, default=224, metavar="N", help="Pixels; default %(default)s."
    )
    parser.add_argument(
        "--implementation",
        choices=["xla", "triton"],
        metavar="xla|triton",
        help="Turn all kernels off, or run them whatever the sizes; by default those that pay.",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="Append all columns to this file.")
    options = parser.parse_args(arguments)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(HEADER, flush=True)
    for model in options.models:
        for batch in options.batch_sizes or BATCH_SIZES[options.pass_]:
            make_setup = functools.partial(set_up, model, options.size, options.implementation)
            row = measure_what_fits(options.pass_, make_setup, batch)
            print(as_text(row), flush=True)
            if options.csv:
                append(options.csv, row.values())


if __name__ == "__main__":
    main(sys.argv[1:])
