"""Local aggregation on NVIDIA GPUs: the Triton kernels, called through jax-triton.

The functions here take and return what their XLA forms in ``plain`` and
``normalized`` do. They work under jit, shard_map and vmap, which becomes a larger N.
Importing this module needs triton, jax-triton and JAX with CUDA.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import jax_triton
import triton
from jax.custom_batching import custom_vmap

from cotnet_jax.ops.local_aggregation.triton import (
    aggregation_kernels,
    cooperative_kernels,
    group_norm_kernels,
)
from cotnet_jax.ops.local_aggregation.triton.configs import (
    choose_norm_tile,
    choose_team_tile,
    choose_tile,
    run_length,
)
from cotnet_jax.ops.varying import vary

# Programs of ``group_norm_backward``: some for each multiprocessor of a GPU, and not many more,
# because each leaves its own sums of the gradients of scale and bias.
PROGRAMS = 528
# What jax-triton 0.3 calls out_shape is out_type in 0.4.
_PARAMETERS = inspect.signature(jax_triton.triton_call).parameters
RESULTS = "out_type" if "out_type" in _PARAMETERS else "out_shape"


def _over_pictures(shared=0, sums=False):
    """Gives a function a vmap that takes the mapped axis into N, the first axis of all operands
    but the last ``shared`` ones; where one of those is mapped too, or the function ``sums`` over
    N, the calls run in turn."""

    def decorate(function):
        @functools.wraps(function)
        def call(*operands, **constants):
            return with_rule(functools.partial(function, **constants))(*operands)

        return call

    def with_rule(function):
        mapped = custom_vmap(function)

        @mapped.def_vmap
        def _(axis_size, in_batched, *operands):
            own = len(operands) - shared
            in_turn = sums or any(in_batched[own:])
            operands = [
                a if batched or (i >= own and not in_turn) else _repeat(a, axis_size)
                for i, (a, batched) in enumerate(zip(operands, in_batched, strict=True))
            ]
            if in_turn:
                outputs = jax.lax.map(lambda arguments: mapped(*arguments), tuple(operands))
            else:
                folded = [a.reshape(-1, *a.shape[2:]) for a in operands[:own]]
                outputs = mapped(*folded, *operands[own:])
                outputs = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), outputs)
            return outputs, jax.tree.map(lambda _: True, outputs)

        return mapped

    return decorate


def _repeat(array, count):
    return jnp.broadcast_to(array, (count, *array.shape))


@_over_pictures()
def forward(values, weights):
    """As ``plain.xla_forward``."""
    operands = (values, weights)
    (output,) = _aggregate(aggregation_kernels.forward, values, weights, operands, [values])
    return output


@_over_pictures()
def backward(values, weights, gradient):
    """As ``plain.xla_backward``."""
    operands = (values, weights, gradient)
    return tuple(
        _aggregate(aggregation_kernels.backward, values, weights, operands, [values, weights])
    )


@_over_pictures(shared=2)
def normalized_forward(values, weights, scale, bias, epsilon):
    """As ``normalized._xla_forward``."""
    tile = team_tile(cooperative_kernels.team_forward, values, weights)
    if tile is not None:
        return team_forward(values, weights, scale, bias, epsilon, tile)
    mean, factor = statistics(weights, epsilon)
    return aggregate_normalized(values, weights, mean, factor, scale, bias), mean, factor


@_over_pictures(shared=4)
def activated_forward(values, weights, scale, bias, output_scale, output_shift, epsilon):
    """As ``normalized._xla_activated_forward``."""
    kernel = cooperative_kernels.team_activated_forward
    tile = team_tile(kernel, values, weights)
    operands = (values, weights, scale, bias, output_scale, output_shift)
    if tile is not None:
        teams = weights.shape[0]
        (output,) = _by_teams(
            kernel, tile, teams, values, weights, operands, [values], EPSILON=epsilon
        )
        return output
    kernel = aggregation_kernels.activated_forward
    operands = (values, weights, *statistics(weights, epsilon), *operands[2:])
    (output,) = _aggregate(kernel, values, weights, operands, [values])
    return output


@_over_pictures(shared=2, sums=True)
def normalized_backward(gradient, values, weights, mean, factor, scale, bias):
    """As ``normalized._xla_backward``."""
    tile = team_tile(cooperative_kernels.team_backward, values, weights)
    if tile is not None:
        return team_backward(gradient, values, weights, mean, factor, scale, bias, tile)
    values_gradient, weights_gradient, sums = aggregation_backward(
        gradient, values, weights, mean, factor, scale, bias
    )
    gradients = group_norm_backward(weights, weights_gradient, mean, factor, scale, sums)
    return values_gradient, *gradients


def team_forward(values, weights, scale, bias, epsilon, tile):
    """As ``normalized_forward``, by the one kernel."""
    n, _, _, groups, _, channels = weights.shape
    statistic = jax.ShapeDtypeStruct((n, groups, 1, channels), jnp.float32)
    operands = (values, weights, scale, bias)
    outputs = [values, statistic, statistic]
    kernel = cooperative_kernels.team_forward
    return tuple(_by_teams(kernel, tile, n, values, weights, operands, outputs, EPSILON=epsilon))


def team_backward(gradient, values, weights, mean, factor, scale, bias, tile):
    """As ``normalized_backward``, by the one kernel."""
    n, h, w, groups, taps, channels = weights.shape
    programs = tile.members(h, w) * (groups * channels // tile.slice)
    teams = min(n, max(1, multiprocessors() * tile.resident // programs))
    lines = teams * math.ceil(h / tile.rows) * w
    parameters = jax.ShapeDtypeStruct((2, lines, groups, taps, channels), jnp.float32)
    *gradients, parameters = _by_teams(
        cooperative_kernels.team_backward,
        tile,
        teams,
        values,
        weights,
        (values, weights, gradient, mean, factor, scale, bias),
        [values, weights, parameters],
        N=n,
        TEAMS=teams,
    )
    return *gradients, *parameters.sum(1)


def aggregate_normalized(values, weights, mean, factor, scale, bias):
    """``forward`` with the weights ``(weights - mean) * factor * scale + bias``.

    mean and factor are [N, G, 1, Cw], scale and bias [G, K*K, Cw], all float32.
    """
    kernel = aggregation_kernels.normalized_forward
    operands = (values, weights, mean, factor, scale, bias)
    (output,) = _aggregate(kernel, values, weights, operands, [values])
    return output


def aggregation_backward(gradient, values, weights, mean, factor, scale, bias):
    """Gradients of the values and of the normalised weights dw, and two sums over every group of
    the latter, of dw * scale * factor and of that times weights - mean, not yet added up over
    their third axis, [2, N, lines, G, Cw]."""
    kernel = aggregation_kernels.normalized_backward
    tile = aggregation_tile(kernel, values, weights)
    n, h, w, groups, _, channels = weights.shape
    sums = (2, n, w * math.ceil(h / tile.rows) * tile.parts, groups, channels)
    operands = (values, weights, gradient, mean, factor, scale, bias)
    outputs = [values, weights, jax.ShapeDtypeStruct(sums, jnp.float32)]
    return tuple(_aggregate(kernel, values, weights, operands, outputs))


def group_norm_backward(weights, gradient, mean, factor, scale, sums):
    """Gradients of the weights, of the scale and of the bias, from what ``aggregation_backward``
    gives."""
    kernel = group_norm_kernels.group_norm_backward
    n, _, _, groups, taps, channels = weights.shape
    blocks = math.ceil(math.prod(weights.shape[1:]) / norm_tile(kernel, weights).block)
    pictures = math.ceil(n / PROGRAMS)
    pieces = min(max(1, PROGRAMS // n), blocks)
    programs = math.ceil(n / pictures) * pieces
    parameters = jax.ShapeDtypeStruct((2, programs, groups, taps, channels), jnp.float32)
    raw_gradient, parameters = _normalize(
        kernel,
        programs,
        weights,
        (weights, gradient, mean, factor, scale, sums),
        [weights, parameters],
        N=n,
        PICTURES=pictures,
        PIECES=pieces,
        LINES=sums.shape[2],
    )
    scale_gradient, bias_gradient = parameters.sum(1)
    return raw_gradient, scale_gradient, bias_gradient


def statistics(weights, epsilon):
    """As ``normalized.group_statistics``, in float32."""
    n, _, _, groups, taps, channels = weights.shape
    statistic = jax.ShapeDtypeStruct((n, groups, 1, channels), jnp.float32)
    return tuple(
        _normalize(
            group_norm_kernels.statistics,
            n * groups,
            weights,
            (weights,),
            [statistic, statistic],
            EPSILON=epsilon,
            RUN=run_length(groups, channels, taps),
        )
    )


def aggregation_tile(kernel, values, weights):
    """The tile that ``kernel`` works in for these shapes."""
    return choose_tile(kernel.fn.__name__, *_shape(values, weights))


def team_tile(kernel, values, weights):
    """As ``aggregation_tile``, for ``cooperative_kernels``; None if the kernel should not run."""
    return choose_team_tile(kernel.fn.__name__, multiprocessors(), *_shape(values, weights))


@functools.cache
def multiprocessors():
    """Of the smallest of this process's GPUs."""
    return min(device.core_count for device in jax.local_devices(backend="cuda"))


def _shape(values, weights):
    """What a tile is chosen by."""
    _, h, w, groups, taps, channels = weights.shape
    share = values.shape[-1] // (groups * channels)
    return weights.dtype.itemsize, h, w, groups, share, channels, taps


def norm_tile(kernel, weights):
    """As ``aggregation_tile``, for a kernel of the normalisation."""
    _, h, w, groups, taps, channels = weights.shape
    return choose_norm_tile(
        kernel.fn.__name__, weights.dtype.itemsize, h, w, groups, channels, taps
    )


def _aggregate(kernel, values, weights, operands, outputs):
    n, h, w, groups, _, channels = weights.shape
    tile = aggregation_tile(kernel, values, weights)
    lanes = n * w * groups * tile.parts * channels
    constants = {"RELOAD": tile.reload} if "RELOAD" in kernel.arg_names else {}
    return call_kernel(
        kernel,
        math.ceil(lanes / tile.block) * math.ceil(h / tile.rows),
        tile.warps,
        operands,
        outputs,
        COLUMNS=n * w,
        **_sizes(values, weights),
        PARTS=tile.parts,
        ROWS=tile.rows,
        BLOCK=tile.block,
        PREFETCH=tile.prefetch,
        **constants,
    )


def _by_teams(kernel, tile, teams, values, weights, operands, outputs, **constants):
    """Calls a kernel of ``cooperative_kernels``."""
    n, h, w, groups, _, channels = weights.shape
    members, slices = tile.members(h, w), groups * channels // tile.slice
    sums = (n * slices, members, 2, triton.next_power_of_2(tile.slice))
    arrived = (n * slices, cooperative_kernels.ARRIVED_STRIDE.value)
    if members == 1:
        sums = arrived = (1,)
    results = call_kernel(
        kernel,
        teams * slices * members,
        tile.warps,
        operands,
        [
            *outputs,
            jax.ShapeDtypeStruct(sums, jnp.float32),
            jax.ShapeDtypeStruct(arrived, jnp.int32),
        ],
        zeroed_outputs=() if members == 1 else (len(outputs) + 1,),
        **_sizes(values, weights),
        MEMBERS=members,
        SLICE=tile.slice,
        ROWS=tile.rows,
        BLOCK=tile.block,
        PREFETCH=tile.prefetch,
        **constants,
    )
    return results[: len(outputs)]


def _sizes(values, weights):
    """What the kernels that aggregate must know of the shapes."""
    _, h, w, groups, taps, channels = weights.shape
    share = values.shape[-1] // (groups * channels)
    return {"H": h, "W": w, "G": groups, "SHARE": share, "CW": channels, "K": math.isqrt(taps)}


def _normalize(kernel, programs, weights, operands, outputs, **constants):
    _, h, w, groups, taps, channels = weights.shape
    tile = norm_tile(kernel, weights)
    return call_kernel(
        kernel,
        programs,
        tile.warps,
        operands,
        outputs,
        H=h,
        W=w,
        G=groups,
        CW=channels,
        TAPS=taps,
        BLOCK=tile.block,
        STAGES=tile.stages,
        **constants,
    )


def call_kernel(kernel, programs, warps, operands, outputs, **constants):
    """Launches so many programs; outputs are like the given arrays."""
    results = jax_triton.triton_call(
        *operands,
        kernel=kernel,
        grid=(programs,),
        num_warps=warps,
        num_stages=1,
        name=f"local_aggregation_{kernel.fn.__name__}",
        **{RESULTS: [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs]},
        **constants,
    )
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    return [vary(result, varying) for result in results]
