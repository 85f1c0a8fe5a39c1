"""Local aggregation on NVIDIA GPUs: the Triton kernels, called through jax-triton.

The functions here take and return what their XLA forms in ``plain`` and ``normalized`` do. They
work under jit, shard_map and vmap, which becomes a larger N. Importing this module needs triton,
jax-triton and JAX with CUDA.

Operands come in one order everywhere, also in the kernels: values, weights, gradient of the result,
mean and rstd, scale and bias, output scale and shift; each function takes some of them.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
import triton
from jax.custom_batching import custom_vmap

from cotnet_jax.ops import triton_call
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton import (
    backward_kernel,
    configs,
    cooperative_kernels,
    forward_kernel,
    group_norm_kernels,
    tuned_configs,
)

# Programs of ``group_norm_backward``: some for each multiprocessor of a GPU, and not many more,
# because each leaves its own partial sums of the gradients of scale and bias.
PROGRAMS = 528
# With 0 for its value the cooperative kernels are not used; see DESIGN.md.
COOPERATIVE_SWITCH = "COTNET_JAX_COOPERATIVE_KERNELS"


def _over_images(shared=(), sums=False):
    """Give a function a vmap that takes the mapped axis into N, the first axis of its operands.

    The operands at the positions ``shared`` have no such axis. Where one of those is mapped too, or
    the function ``sums`` over N, the calls run in turn.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*operands, **constants):
            return with_rule(functools.partial(function, **constants))(*operands)

        return call

    def with_rule(function):
        mapped = custom_vmap(function)

        @mapped.def_vmap
        def _(axis_size, in_batched, *operands):
            in_turn = sums or any(in_batched[i] for i in shared)
            operands = [
                a if batched or (i in shared and not in_turn) else _repeat(a, axis_size)
                for i, (a, batched) in enumerate(zip(operands, in_batched, strict=True))
            ]
            if in_turn:
                outputs = jax.lax.map(lambda arguments: mapped(*arguments), tuple(operands))
            else:
                folded = [
                    a if i in shared else a.reshape(-1, *a.shape[2:])
                    for i, a in enumerate(operands)
                ]
                outputs = mapped(*folded)
                outputs = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), outputs)
            return outputs, jax.tree.map(lambda _: True, outputs)

        return mapped

    return decorate


def _repeat(array, count):
    return jnp.broadcast_to(array, (count, *array.shape))


@_over_images()
def forward(values, weights):
    """As ``plain.xla_forward``."""
    return _forward("forward", values, weights)


@_over_images()
def backward(values, weights, gradient):
    """As ``plain.xla_backward``."""
    values_gradient, weights_gradient, _ = _backward("backward", values, weights, gradient)
    return values_gradient, weights_gradient


@_over_images(shared=(2, 3))
def normalized_forward(values, weights, scale, bias, epsilon):
    """As ``normalized.xla_normalized_forward``."""
    config = cooperative_config("cooperative_forward", values, weights)
    if config is not None:
        return cooperative_forward(values, weights, scale, bias, epsilon=epsilon, config=config)
    mean, rstd = statistics(weights, epsilon)
    return aggregate_normalized(values, weights, mean, rstd, scale, bias), mean, rstd


@_over_images(shared=(2, 3, 4, 5))
def activated_forward(values, weights, scale, bias, output_scale, output_shift, epsilon):
    """As ``normalized.xla_activated_forward``."""
    operands = (values, weights, scale, bias, output_scale, output_shift)
    config = cooperative_config("cooperative_forward", values, weights)
    if config is not None:
        return cooperative_forward(*operands, epsilon=epsilon, config=config)[0]
    return aggregate_normalized(values, weights, *statistics(weights, epsilon), *operands[2:])


@_over_images(shared=(5, 6), sums=True)
def normalized_backward(values, weights, gradient, mean, rstd, scale, bias):
    """As ``normalized.xla_normalized_backward``."""
    operands = (values, weights, gradient, mean, rstd, scale, bias)
    config = cooperative_config("cooperative_backward", values, weights)
    if config is not None:
        return cooperative_backward(*operands, config=config)
    values_gradient, weights_gradient, sums = aggregation_backward(*operands)
    gradients = group_norm_backward(weights, weights_gradient, mean, rstd, scale, sums)
    return values_gradient, *gradients


def aggregate_normalized(values, weights, mean, rstd, scale, bias, *output_affine):
    """As ``forward`` with the weights ``(weights - mean) * rstd * scale + bias``.

    mean and rstd are [N, G, 1, Cw], scale and bias [G, K*K, Cw]; with an output scale and shift [C]
    the result has the epilogue of ``activated_forward``. All these are float32.
    """
    normalization = (mean, rstd, scale, bias)
    return _forward("normalized_forward", values, weights, normalization, output_affine)


def aggregation_backward(values, weights, gradient, mean, rstd, scale, bias):
    """Return the first half of ``normalized_backward``.

    Returns:
      Gradients of the values and of the normalised weights, dw, and partial sums over every group
      of the latter, of dw * scale * rstd and of that times weights - mean, not yet added up over
      their third axis, [2, N, lines, G, Cw].
    """
    normalization = (mean, rstd, scale, bias)
    return _backward("normalized_backward", values, weights, gradient, normalization)


def cooperative_forward(values, weights, scale, bias, *output_affine, epsilon, config):
    """As ``normalized_forward``, by the one kernel; with an output scale and shift as
    ``activated_forward``, and then without the statistics."""
    n, _, _, groups, _, channels = weights.shape
    activate = bool(output_affine)
    statistic = _float32((1,) if activate else (n, groups, 1, channels))
    return _cooperate(
        cooperative_kernels.cooperative_forward,
        config,
        n,
        (values, weights, scale, bias, *(output_affine or (values, values))),
        [values, statistic, statistic],
        EPSILON=epsilon,
        ACTIVATE=activate,
    )


def cooperative_backward(values, weights, gradient, mean, rstd, scale, bias, *, config):
    """As ``normalized_backward``, by the one kernel."""
    n, h, w, groups, taps, channels = weights.shape
    programs = config.programs(h, w) * (groups * channels // config.slice)
    count = min(n, max(1, gpu().multiprocessors * config.resident // programs))
    lines = count * math.ceil(h / config.rows) * w
    *gradients, parameters = _cooperate(
        cooperative_kernels.cooperative_backward,
        config,
        count,
        (values, weights, gradient, mean, rstd, scale, bias),
        [values, weights, _float32((2, lines, groups, taps, channels))],
        N=n,
        GROUPS=count,
    )
    return *gradients, *parameters.sum(1)


def group_norm_backward(weights, gradient, mean, rstd, scale, sums):
    """Return gradients of the weights, of the scale and of the bias, from what
    ``aggregation_backward`` gives."""
    n, _, _, groups, taps, channels = weights.shape
    config = normalization_config("group_norm_backward", weights)
    blocks = math.ceil(math.prod(weights.shape[1:]) / config.block)
    images = math.ceil(n / PROGRAMS)
    pieces = min(max(1, PROGRAMS // n), blocks)
    programs = math.ceil(n / images) * pieces
    raw_gradient, parameters = _normalize(
        group_norm_kernels.group_norm_backward,
        config,
        programs,
        (weights, gradient, mean, rstd, scale, sums),
        [weights, _float32((2, programs, groups, taps, channels))],
        N=n,
        IMAGES=images,
        PIECES=pieces,
        LINES=sums.shape[2],
    )
    scale_gradient, bias_gradient = parameters.sum(1)
    return raw_gradient, scale_gradient, bias_gradient


def statistics(weights, epsilon):
    """As ``normalized.group_statistics``, in float32."""
    n, _, _, groups, taps, channels = weights.shape
    statistic = _float32((n, groups, 1, channels))
    return _normalize(
        group_norm_kernels.statistics,
        normalization_config("statistics", weights),
        n * groups,
        (weights,),
        [statistic, statistic],
        EPSILON=epsilon,
        RUN=configs.run_length(groups, channels, taps),
    )


@functools.cache
def gpu() -> tuned_configs.Gpu:
    """Return the smallest of this process's GPUs."""
    devices = jax.local_devices(backend="cuda")
    smallest = min(devices, key=lambda device: device.core_count)
    return tuned_configs.Gpu(smallest.device_kind, smallest.compute_capability, smallest.core_count)


def aggregation_config(name, values, weights):
    """Return the configuration of an aggregation by its name in the table."""
    shape = AggregationShape.of(values, weights)
    return configs.choose_config(_table(), name, weights.dtype.itemsize, shape)


def cooperative_config(name, values, weights):
    """As ``aggregation_config``, for a cooperative kernel; None if it should not run."""
    if not cooperative_kernels_enabled():
        return None
    shape = AggregationShape.of(values, weights)
    return configs.choose_cooperative_config(
        _table(), name, gpu().multiprocessors, weights.dtype.itemsize, shape
    )


def cooperative_kernels_enabled() -> bool:
    """Return whether the environment leaves the cooperative kernels on.

    Raises:
      ValueError: the variable has another value than 0 and 1.
    """
    value = os.environ.get(COOPERATIVE_SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"{COOPERATIVE_SWITCH}={value!r}: set it to 0 to turn the cooperative kernels off, or "
            "to 1, or unset it, to leave them on"
        )
    return value == "1"


def normalization_config(name, weights):
    """As ``aggregation_config``, for a kernel of the normalisation."""
    _, h, w, groups, taps, channels = weights.shape
    shape = AggregationShape(h, w, groups, 1, channels, math.isqrt(taps))
    return configs.choose_normalization_config(_table(), name, weights.dtype.itemsize, shape)


def _table():
    return tuned_configs.nearest(gpu()).table


def _forward(name, values, weights, normalization=(), output_affine=()):
    config = aggregation_config(name, values, weights)
    # The kernel takes all its pointers; those that its options leave out are not read.
    unused = values
    (output,) = call_kernel(
        forward_kernel.forward,
        _programs(config, values, weights),
        config.num_warps,
        (
            *(values, weights),
            *(normalization or (unused, unused, unused, unused)),
            *(output_affine or (unused, unused)),
        ),
        [values],
        N=weights.shape[0],
        SHAPE=AggregationShape.of(values, weights),
        CONFIG=config,
        NORMALIZE=bool(normalization),
        ACTIVATE=bool(output_affine),
    )
    return output


def _backward(name, values, weights, gradient, normalization=()):
    config = aggregation_config(name, values, weights)
    n, h, w, groups, _, channels = weights.shape
    lines = w * math.ceil(h / config.rows) * config.parts
    unused = values
    return call_kernel(
        backward_kernel.backward,
        _programs(config, values, weights),
        config.num_warps,
        (values, weights, gradient, *(normalization or (unused, unused, unused, unused))),
        [values, weights, _float32((2, n, lines, groups, channels) if normalization else (1,))],
        N=n,
        SHAPE=AggregationShape.of(values, weights),
        CONFIG=config,
        NORMALIZE=bool(normalization),
    )


def _programs(config, values, weights):
    """Return the size of the grid of an aggregation kernel."""
    n, h, w, groups, _, channels = weights.shape
    lanes = n * w * groups * config.parts * channels
    return math.ceil(lanes / config.block) * math.ceil(h / config.rows)


def _cooperate(kernel, config, count, operands, outputs, **constants):
    """Call a cooperative kernel with ``count`` cooperative groups for each slice."""
    values, weights, *_ = operands
    n, h, w, groups, _, channels = weights.shape
    programs, slices = config.programs(h, w), groups * channels // config.slice
    sums = (n * slices, programs, 2, triton.next_power_of_2(config.slice))
    arrived = (n * slices, cooperative_kernels.ARRIVED_STRIDE.value)
    if programs == 1:
        sums = arrived = (1,)
    results = call_kernel(
        kernel,
        count * slices * programs,
        config.num_warps,
        operands,
        [*outputs, _float32(sums), jax.ShapeDtypeStruct(arrived, jnp.int32)],
        zeroed_outputs=() if programs == 1 else (len(outputs) + 1,),
        SHAPE=AggregationShape.of(values, weights),
        CONFIG=config,
        PROGRAMS=programs,
        **constants,
    )
    return results[: len(outputs)]


def _normalize(kernel, config, programs, operands, outputs, **constants):
    _, h, w, groups, taps, channels = operands[0].shape
    return call_kernel(
        kernel,
        programs,
        config.num_warps,
        operands,
        outputs,
        PIXELS=h * w,
        G=groups,
        CW=channels,
        TAPS=taps,
        CONFIG=config,
        **constants,
    )


def _float32(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def call_kernel(kernel, *arguments, **constants):
    """As ``triton_call.call_kernel``, under a name that says whose kernel it is."""
    name = f"local_aggregation_{kernel.fn.__name__}"
    return triton_call.call_kernel(kernel, *arguments, name=name, **constants)
