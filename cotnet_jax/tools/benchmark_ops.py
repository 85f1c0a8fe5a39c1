"""Measure the speed and the error of the package's own operations on this machine's accelerator.

One line for each shape and variant of the local aggregation: time, TB/s of the least traffic that
the aggregation alone needs, its share of the measured copy bandwidth, and the error against
float64. The header says on which GPU the kernels' configurations were measured.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.command_line import Parser, positive
from cotnet_jax.ops import dispatch
from cotnet_jax.ops.local_aggregation import normalized, plain, reference
from cotnet_jax.ops.local_aggregation.shapes import MODEL_SHAPES, AggregationShape

EPSILON = 1e-5
# Calls in a program, at least: XLA launches five or more together, as a CUDA graph, if it can.
CALLS = 8
# Images of a batch that are compared with float64.
COMPARED = 2


def input_sets(function: str, batch: int, shape: AggregationShape, dtype) -> list[list]:
    """Return shapes and dtypes of the operands of a function, for several calls.

    The sets are together larger than a GPU's cache. ``function`` is the name of one in ``launch``,
    or "normalized" or "normalized_vjp" for the normalised aggregation and its gradients.
    """
    values = (batch, shape.h, shape.w, shape.pixel_values)
    taps = (shape.groups, shape.taps, shape.channels)
    weights = (batch, shape.h, shape.w, *taps)
    statistic = (batch, shape.groups, 1, shape.channels)
    backward = [values, weights, values, statistic, statistic, taps, taps]
    shapes_of: dict[str, list[tuple[int, ...]]] = {
        "forward": [values, weights],
        "backward": [values, weights, values],
        "aggregate_normalized": [values, weights, statistic, statistic, taps, taps],
        "aggregation_backward": backward,
        "statistics": [weights],
        "group_norm_backward": [
            *(weights, weights, statistic, statistic, taps),
            (2, batch, shape.w, shape.groups, shape.channels),
        ],
        "cooperative_forward": [values, weights, taps, taps],
        "cooperative_backward": backward,
        "normalized": [values, weights, taps, taps],
        "normalized_vjp": [values, weights, values, taps, taps],
    }
    operands = [
        jax.ShapeDtypeStruct(s, dtype if s in (values, weights) else jnp.float32)
        for s in shapes_of[function]
    ]
    traffic = sum(a.size * a.dtype.itemsize for a in operands)
    return [operands] * int(max(2, min(16, 5e8 // traffic)))


def fill(sets, seed=0):
    """Return normal random numbers in place of the shapes and dtypes."""

    @jax.jit
    def make(key):
        keys = jax.random.split(key, len(sets[0]))
        return [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, sets[0], strict=True)]

    return [make(key) for key in jax.random.split(jax.random.key(seed), len(sets))]


def on_poisoned_memory(function, operands):
    """Return the function's results, and how many of them lie where there was NaN just before.

    It is compiled to give its results in the memory of arrays of NaN that it takes.
    """
    into = jax.jit(lambda poison, operands: function(*operands), donate_argnums=0, keep_unused=True)
    shapes = jax.eval_shape(function, *operands)
    poison = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), shapes)
    addresses = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(poison)}
    results = jax.block_until_ready(into(poison, operands))
    return results, sum(a.unsafe_buffer_pointer() in addresses for a in jax.tree.leaves(results))


def compile_repeated(call, sets):
    """Compile one program that calls once with every set of operands, one after the other.

    The sets are arrays, or their shapes and dtypes. The program is given its results of before, to
    write the new ones in their place: at other addresses XLA would have to change its CUDA graphs.
    """

    def repeated(results, sets):
        del results
        return [call(*operands) for operands in sets]

    results = jax.eval_shape(repeated, None, sets)
    jitted = jax.jit(repeated, donate_argnums=0, keep_unused=True)
    return jitted.lower(results, sets).compile()


def time_repeated(repeated, sets, seconds=0.1, repeats=5):
    """Return the median time of one call in seconds, of programs dispatched one after the other.

    Each repeat takes ``seconds``: starting and waiting for it costs up to a millisecond.
    """
    results = jax.tree.map(lambda a: jnp.empty(a.shape, a.dtype), repeated.out_info)
    results = jax.block_until_ready(repeated(results, sets))

    def run(count):
        nonlocal results
        start = time.perf_counter()
        for _ in range(count):
            results = repeated(results, sets)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / count

    count = max(2, int(seconds / max(run(1), 1e-6)))
    return statistics.median(run(count) for _ in range(repeats)) / len(sets)


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of a copy of 2 GiB on the default device."""
    sets = [[jnp.full((2**30,), i, jnp.uint16)] for i in range(2)]
    repeated = compile_repeated(jnp.copy, sets)
    return 2 * sets[0][0].nbytes / time_repeated(repeated, sets)


def relative_error(arrays, expected) -> float:
    """Return the largest relative L2 error of the arrays' first images."""
    errors = []
    for array, wanted in zip(arrays, expected, strict=True):
        difference = np.asarray(array[:COMPARED], np.float64) - wanted
        errors.append(np.linalg.norm(difference) / np.linalg.norm(wanted))
    return float(max(errors))


def calls(implementation: str) -> dict:
    """Return passes of both operations, by variant and pass, as functions of arrays alone.

    Operands come in the order of ``input_sets``: the gradient of the result is the third.
    """

    def aggregate(values, weights):
        return plain.local_aggregation(values, weights, implementation=implementation)

    def separate(values, raw, scale, bias):
        mean, rstd = normalized.group_statistics(raw, EPSILON)
        return aggregate(values, normalized.normalize(raw, mean, rstd, scale, bias))

    def fused(values, raw, scale, bias):
        return normalized.normalized_local_aggregation(
            values, raw, scale, bias, epsilon=EPSILON, implementation=implementation
        )

    def both(function):
        def value_and_gradients(values, weights, gradient, *parameters):
            value, pullback = jax.vjp(function, values, weights, *parameters)
            return value, *pullback(gradient)

        return value_and_gradients

    def backward(values, weights, gradient):
        return both(aggregate)(values, weights, gradient)[1:]

    return {
        ("plain", "forward"): aggregate,
        ("plain", "backward"): backward,
        ("separate", "forward"): separate,
        ("separate", "both"): both(separate),
        ("fused", "forward"): fused,
        ("fused", "both"): both(fused),
    }


# Operation and pass, the name of its operands in ``input_sets``, and its results among those of the
# reference that are compared.
PASSES = (
    ("plain", "forward", "forward", slice(1)),
    ("plain", "backward", "backward", slice(1, 3)),
    ("normalized", "forward", "normalized", slice(1)),
    ("normalized", "both", "normalized_vjp", slice(3)),
)
ROW = "{:>11}  {:<8}  {:<19}  {:>9}  {:>5}  {:>6}  {:>8}"


def expected_results(operation: str, direction: str, operands) -> tuple:
    """Return the float64 results for the first images of a set of operands."""
    first = [np.asarray(a[:COMPARED] if a.ndim > 3 else a).astype(np.float64) for a in operands]
    if direction == "forward":
        # Any gradient does: what comes of it is not compared.
        first.insert(2, first[0])
    if operation == "plain":
        return reference.local_aggregation(*first)
    return reference.normalized_local_aggregation(*first, epsilon=EPSILON)


def benchmark_aggregation(batch, dtype, shapes, implementations) -> None:
    """Print the table for some ``AggregationShape``s."""
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, batch {batch}, {dtype}")
    if "triton" in implementations:
        print(describe_configs())
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, read and written")
    print("TB/s are of the least traffic: values, weights, result; backward with their gradients")
    print(ROW.format("HxWxC", "pass", "variant", "us", "TB/s", "copy", "error"))
    for shape in shapes:
        for operation, direction, name, part in PASSES:
            sets = fill(input_sets(name, batch, shape, dtype))
            expected = expected_results(operation, direction, sets[0])[part]
            variants = [(operation, i) for i in implementations]
            if operation == "normalized":
                variants = [("separate", i) for i in implementations]
                variants += [("fused", i) for i in implementations if i != "xla"]
            for variant, implementation in variants:
                call = calls(implementation)[variant, direction]
                seconds, error = measure(call, sets, expected)
                elements = batch * shape.h * shape.w * elements_moved(shape, direction)
                rate = elements * np.dtype(dtype).itemsize / seconds
                label = f"{variant} norm, {implementation}"
                if variant == "plain":
                    label = implementation
                size = f"{shape.h}x{shape.w}x{shape.pixel_values}"
                numbers = (f"{seconds * 1e6:.1f}", f"{rate / 1e12:.2f}", f"{rate / bandwidth:.0%}")
                print(ROW.format(size, direction, label, *numbers, f"{error:.1e}"), flush=True)


def describe_configs() -> str:
    """Return one line about where the kernels' configurations come from."""
    # Importable only where there is a GPU.
    from cotnet_jax.ops.local_aggregation.triton import launch, tuned_configs

    return tuned_configs.describe(launch.gpu())


def elements_moved(shape: AggregationShape, direction: str) -> int:
    """Return the least elements that a pass reads and writes for each pixel."""
    values, weights = shape.pixel_values, shape.pixel_weights
    forward, backward = 2 * values + weights, 3 * values + 2 * weights
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def measure(call, sets, expected) -> tuple[float, float]:
    """Return seconds of one call, and the error of its first results."""
    output, _ = on_poisoned_memory(call, sets[0])
    output = output if isinstance(output, tuple) else (output,)
    error = relative_error(output[: len(expected)], expected)
    turns = sets * max(2, math.ceil(CALLS / len(sets)))
    return time_repeated(compile_repeated(call, turns), turns), error


def by_comma(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a ``type`` for ``add_argument``: some of the ``known`` names, separated by commas."""
    known = list(known)

    def parse(text):
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(
                f"no {', '.join(unknown)}; choose from {', '.join(known)}"
            )
        return text.split(",")

    return parse


def main(arguments: list[str]) -> None:
    command = "python -m cotnet_jax.tools.benchmark_ops aggregation"
    parser = Parser(
        "Measure the speed and the error of the local aggregation on this machine's accelerator.",
        [
            command,
            f"{command} --shapes=cotnet50 --dtype=float32",
            f"{command} --shapes=cotnet50,cotnext50_2x48d --implementations=triton",
        ],
    )
    parser.add_argument(
        "operation", nargs="?", choices=["aggregation"], required=True, help="The operation."
    )
    parser.add_argument(
        "--batch_size", type=positive, default=512, metavar="N", help="Images; default %(default)s."
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="Of values and weights; default %(default)s.",
    )
    parser.add_argument(
        "--shapes",
        type=by_comma(MODEL_SHAPES),
        default=list(MODEL_SHAPES),
        metavar="MODEL,...",
        help=f"Those of some models, of {', '.join(MODEL_SHAPES)}; default all.",
    )
    parser.add_argument(
        "--implementations",
        type=by_comma(["xla", "triton"]),
        default=["xla", "triton"] if dispatch.kernel_available() else ["xla"],
        metavar="NAME,...",
        help="Of xla and triton; default those that run here.",
    )
    options = parser.parse_args(arguments)
    shapes = [shape for name in options.shapes for shape in MODEL_SHAPES[name]]
    dtype = jnp.dtype(options.dtype)
    benchmark_aggregation(options.batch_size, dtype, shapes, options.implementations)


if __name__ == "__main__":
    main(sys.argv[1:])
