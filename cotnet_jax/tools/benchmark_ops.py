"""Speed and error of the package's own operations on this machine's accelerator.

    python -m cotnet_jax.tools.benchmark_ops aggregation [--batch=512] [--dtype=bfloat16]
        [--shapes=cotnet50]

prints one line for each shape and form of the local aggregation: time, TB/s of the least traffic
that the aggregation alone needs, its share of the measured copy bandwidth, and the error against
float64.
"""

import argparse
import math
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.ops.local_aggregation import dispatch, normalized

SHARE = 8
EPSILON = 1e-5
# Input of each shape: H = W, channel groups, channels.
SHAPES = {
    "cotnet50": ((56, 1, 64), (28, 1, 128), (14, 1, 256), (7, 1, 512)),
    "cotnext50": ((56, 2, 96), (28, 2, 192), (14, 2, 384), (7, 2, 768)),
    "se_cotnetd_152": ((16, 1, 256), (8, 1, 512)),
    "se_cotnetd_152_L": ((20, 1, 256), (10, 1, 512)),
}
# Calls in a program, at least: XLA launches five or more together, as a CUDA graph, if it can.
CALLS = 8
# Pictures of a batch that are compared with float64.
COMPARED = 2


def input_sets(kernel, batch, size, groups, width, dtype):
    """Shapes and dtypes of the operands of the function ``kernel``, for several calls.

    The sets are together larger than a GPU's cache. ``kernel`` is one of ``launch``, or
    "normalized" or "normalized_vjp".
    """
    pixels, channels = (batch, size, size), width // groups // SHARE
    values, weights = (*pixels, width), (*pixels, groups, 9, channels)
    groups_shape = (batch, groups, 1, channels)
    taps = (groups, 9, channels)
    backward = [values, values, weights, groups_shape, groups_shape, taps, taps]
    shapes = {
        "forward": [values, weights],
        "backward": [values, weights, values],
        "aggregate_normalized": [values, weights, groups_shape, groups_shape, taps, taps],
        "aggregation_backward": backward,
        "statistics": [weights],
        "group_norm_backward": [
            *(weights, weights, groups_shape, groups_shape, taps),
            (2, batch, size, groups, channels),
        ],
        "team_forward": [values, weights, taps, taps],
        "team_backward": backward,
        "normalized": [values, weights, taps, taps],
        "normalized_vjp": [values, weights, taps, taps, values],
    }[kernel]
    operands = [
        jax.ShapeDtypeStruct(s, dtype if s in (values, weights) else jnp.float32) for s in shapes
    ]
    traffic = sum(a.size * a.dtype.itemsize for a in operands)
    return [operands] * int(max(2, min(16, 5e8 // traffic)))


def fill(sets, seed=0):
    """Normal random numbers in place of the shapes and dtypes."""

    @jax.jit
    def make(key):
        keys = jax.random.split(key, len(sets[0]))
        return [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, sets[0], strict=True)]

    return [make(key) for key in jax.random.split(jax.random.key(seed), len(sets))]


def on_poisoned_memory(function, operands):
    """The function's results, and how many of them lie where there was NaN just before.

    It is compiled to give its results in the memory of arrays of NaN that it takes.
    """
    into = jax.jit(lambda poison, operands: function(*operands), donate_argnums=0, keep_unused=True)
    shapes = jax.eval_shape(function, *operands)
    poison = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), shapes)
    addresses = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(poison)}
    results = jax.block_until_ready(into(poison, operands))
    return results, sum(a.unsafe_buffer_pointer() in addresses for a in jax.tree.leaves(results))


def compile_repeated(call, sets):
    """Compiles one program that calls once with every set of operands, one after the other.

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
    """Median time of one call in seconds, of programs dispatched one after the other.

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
    """Bytes a second, read and written, of a copy of 2 GiB on the default device."""
    sets = [[jnp.full((2**30,), i, jnp.uint16)] for i in range(2)]
    repeated = compile_repeated(jnp.copy, sets)
    return 2 * sets[0][0].nbytes / time_repeated(repeated, sets)


def reference(values, weights, gradient):
    """Aggregation and both its gradients of NumPy float64 arrays."""
    n, h, w, groups, taps, channels = weights.shape
    split = (n, h, w, groups, -1, channels)
    values, gradient = values.reshape(split), gradient.reshape(split)
    margin = [(0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)]
    padded = np.pad(values, margin)
    output, padded_gradient = np.zeros_like(values), np.zeros_like(padded)
    weights_gradient = np.zeros_like(weights)
    for tap in range(taps):
        i, j = divmod(tap, 3)
        window = padded[:, i : i + h, j : j + w]
        weight = weights[..., tap, None, :]
        output += weight * window
        padded_gradient[:, i : i + h, j : j + w] += weight * gradient
        weights_gradient[..., tap, :] = (gradient * window).sum(4)
    flat = (n, h, w, -1)
    values_gradient = padded_gradient[:, 1:-1, 1:-1]
    return output.reshape(flat), values_gradient.reshape(flat), weights_gradient


def normalized_reference(values, raw, scale, bias, gradient):
    """As ``reference``, for group-normalised weights and the gradient of the raw ones."""
    axes = (1, 2, 4)
    mean = raw.mean(axes, keepdims=True)
    factor = 1 / np.sqrt(raw.var(axes, keepdims=True) + EPSILON)
    normal = (raw - mean) * factor
    output, values_gradient, dw = reference(values, normal * scale + bias, gradient)
    dn = dw * scale
    dn -= dn.mean(axes, keepdims=True) + normal * (dn * normal).mean(axes, keepdims=True)
    return output, values_gradient, dn * factor


def relative_error(arrays, expected) -> float:
    """Largest relative L2 error of the arrays' first pictures."""
    errors = []
    for array, wanted in zip(arrays, expected, strict=True):
        difference = np.asarray(array[:COMPARED], np.float64) - wanted
        errors.append(np.linalg.norm(difference) / np.linalg.norm(wanted))
    return max(errors)


def forms(implementation):
    """Forward and backward of both operations, as functions of arrays alone."""

    def vjp(function):
        def pullback(*operands):
            return jax.vjp(function, *operands[:-1])[1](operands[-1])

        return pullback

    def both(function):
        def value_and_gradients(*operands):
            value, pullback = jax.vjp(function, *operands[:-1])
            return value, *pullback(operands[-1])

        return value_and_gradients

    def plain(values, weights):
        return plain.local_aggregation(values, weights, implementation=implementation)

    def separate(values, raw, scale, bias):
        mean, factor = normalized.group_statistics(raw, EPSILON)
        return plain(values, normalized.normalize(raw, mean, factor, scale, bias))

    def fused(values, raw, scale, bias):
        return normalized.normalized_local_aggregation(
            values, raw, scale, bias, epsilon=EPSILON, implementation=implementation
        )

    return {
        ("plain", "forward"): plain,
        ("plain", "backward"): vjp(plain),
        ("separate", "forward"): separate,
        ("separate", "both"): both(separate),
        ("fused", "forward"): fused,
        ("fused", "both"): both(fused),
    }


def benchmark_aggregation(batch, dtype, shapes, implementations):
    """Prints the table; ``shapes`` are (H = W, groups, channels)."""
    bandwidth = copy_bandwidth()
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, batch {batch}, {dtype}")
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, read and written")
    print("TB/s are of the least traffic: values, weights, result; backward with their gradients")
    row = "{:>11}  {:<8}  {:<19}  {:>9}  {:>5}  {:>6}  {:>8}"
    print(row.format("HxWxC", "pass", "form", "us", "TB/s", "copy", "error"))
    for size, groups, width in shapes:
        pixels = batch * size * size
        elements = {"forward": 2 * width + 9 * width // 8, "backward": 3 * width + 9 * width // 4}
        elements["both"] = sum(elements.values())
        for kind, direction in (
            *(("plain", "forward"), ("plain", "backward")),
            *(("normalized", "forward"), ("normalized", "both")),
        ):
            name = {
                ("plain", "forward"): "forward",
                ("plain", "backward"): "backward",
                ("normalized", "forward"): "normalized",
                ("normalized", "both"): "normalized_vjp",
            }[kind, direction]
            sets = fill(input_sets(name, batch, size, groups, width, dtype))
            first = [
                np.asarray(a[:COMPARED] if a.ndim > 3 else a).astype(np.float64) for a in sets[0]
            ]
            if kind == "plain":
                expected = reference(*first, *([] if direction == "backward" else first[:1]))
                variants = [("plain", i) for i in implementations]
            else:
                gradient = first[:1] if direction == "forward" else []
                expected = normalized_reference(*first, *gradient)
                variants = [("separate", i) for i in implementations]
                variants += [("fused", i) for i in implementations if i != "xla"]
            part = {"forward": slice(1), "backward": slice(1, 3), "both": slice(3)}[direction]
            for form, implementation in variants:
                call = forms(implementation)[form, direction]
                output, _ = on_poisoned_memory(call, sets[0])
                output = (output,) if direction == "forward" else output
                error = relative_error(output[:3], expected[part])
                turns = sets * max(2, math.ceil(CALLS / len(sets)))
                seconds = time_repeated(compile_repeated(call, turns), turns)
                rate = pixels * elements[direction] * np.dtype(dtype).itemsize / seconds
                label = implementation if form == "plain" else f"{form} norm, {implementation}"
                print(
                    row.format(
                        f"{size}x{size}x{width}",
                        direction,
                        label,
                        f"{seconds * 1e6:.1f}",
                        f"{rate / 1e12:.2f}",
                        f"{rate / bandwidth:.0%}",
                        f"{error:.1e}",
                    ),
                    flush=True,
                )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=["aggregation"])
    parser.add_argument("--batch", type=int, default=512, help="pictures")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help=f"by comma, of {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--implementations",
        default="xla,triton" if dispatch.kernel_available() else "xla",
        help="by comma, of xla and triton",
    )
    options = parser.parse_args(arguments)
    names = options.shapes.split(",")
    if unknown := set(names) - set(SHAPES):
        parser.error(f"--shapes: no {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    shapes = [shape for name in names for shape in SHAPES[name]]
    benchmark_aggregation(
        options.batch, jnp.dtype(options.dtype), shapes, options.implementations.split(",")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
