"""Local aggregation on NVIDIA GPUs: the Triton kernels, called through jax-triton.

The functions here take and return what their XLA forms in ``aggregation`` and
``normalized_aggregation`` do. They work under jit, shard_map and vmap, which becomes a larger N.
Importing this module needs triton, jax-triton and JAX with CUDA.
"""

import functools
import math

import jax
import jax.numpy as jnp
import jax_triton
from jax.custom_batching import custom_vmap

from cotnet_jax.layers import aggregation_kernels as kernels
from cotnet_jax.layers.aggregation_dispatch import vary
from cotnet_jax.layers.aggregation_tiles import Tile, choose_tile


def _over_pictures(shared=0):
    """Gives a function a vmap that takes the mapped axis into N, the first axis of all operands
    but the last ``shared`` ones; where one of those is mapped too, the calls run in turn."""

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
            operands = [
                a if batched or (i >= own and not any(in_batched[own:])) else _repeat(a, axis_size)
                for i, (a, batched) in enumerate(zip(operands, in_batched, strict=True))
            ]
            if any(in_batched[own:]):
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
    """As ``aggregation.xla_forward``."""
    (output,) = _call(kernels.forward, values, weights, (values, weights), [_like(values)])
    return output


@_over_pictures()
def backward(values, weights, gradient):
    """As ``aggregation.xla_backward``."""
    operands = (values, weights, gradient)
    return tuple(
        _call(kernels.backward, values, weights, operands, [_like(values), _like(weights)])
    )


@_over_pictures(shared=2)
def normalized_forward(values, weights, mean, factor, scale, bias):
    """``forward`` with the weights ``(weights - mean) * factor * scale + bias``.

    mean and factor are [N, G, 1, Cw], scale and bias [G, K*K, Cw], all float32.
    """
    operands = (values, weights, mean, factor, scale, bias)
    (output,) = _call(kernels.normalized_forward, values, weights, operands, [_like(values)])
    return output


@_over_pictures(shared=4)
def activated_forward(values, weights, mean, factor, scale, bias, output_scale, output_shift):
    """SiLU(output_scale * y + output_shift) of ``normalized_forward``'s y; both [C] float32."""
    operands = (values, weights, mean, factor, scale, bias, output_scale, output_shift)
    (output,) = _call(kernels.activated_forward, values, weights, operands, [_like(values)])
    return output


@_over_pictures(shared=2)
def normalized_backward(gradient, values, weights, mean, factor, scale, bias):
    """As ``normalized_aggregation._xla_backward``."""
    tile = tile_of(kernels.normalized_backward, values, weights)
    n, h, w, groups, taps, channels = weights.shape
    sums = (n, w, math.ceil(h / tile.rows), groups, tile.parts, taps, channels)
    sums = jax.ShapeDtypeStruct(sums, jnp.float32)
    operands = (values, weights, gradient, mean, factor, scale, bias)
    outputs = [_like(values), _like(weights), sums, sums]
    *gradients, sums, products = _call(
        kernels.normalized_backward, values, weights, operands, outputs
    )
    return *gradients, sums.sum((1, 2, 4)), products.sum((1, 2, 4))


@_over_pictures()
def statistics(weights, epsilon):
    """As ``normalized_aggregation._xla_statistics``, in float32."""
    n, _, _, groups, _, channels = weights.shape
    statistic = jax.ShapeDtypeStruct((n, groups, 1, channels), jnp.float32)
    outputs = [statistic, statistic]
    return tuple(_call(kernels.statistics, weights, weights, (weights,), outputs, EPSILON=epsilon))


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def tile_of(kernel, values, weights) -> Tile:
    """The tile that ``kernel`` works in for these shapes."""
    _, h, w, groups, taps, channels = weights.shape
    share = values.shape[-1] // (groups * channels) if values.ndim == 4 else 1
    return choose_tile(
        kernel.fn.__name__, weights.dtype.itemsize, h, w, groups, share, channels, taps
    )


def _call(kernel, values, weights, operands, outputs, **constants):
    n, h, w, groups, taps, channels = weights.shape
    tile = tile_of(kernel, values, weights)
    sizes = {
        "COLUMNS": n * w,
        "H": h,
        "W": w,
        "G": groups,
        "SHARE": values.shape[-1] // (groups * channels),
        "CW": channels,
        "K": math.isqrt(taps),
        "TAPS": taps,
        "CHANNELS": 1 << (channels - 1).bit_length(),
        "PARTS": tile.parts,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "PREFETCH": tile.prefetch,
    }
    if "COLUMNS" in kernel.arg_names:
        lanes = n * w * groups * tile.parts * channels
        programs = math.ceil(lanes / tile.block) * math.ceil(h / tile.rows)
    else:
        programs = n * groups
    results = jax_triton.triton_call(
        *operands,
        kernel=kernel,
        out_shape=outputs,
        grid=(programs,),
        num_warps=tile.warps,
        num_stages=1,
        name=f"local_aggregation_{kernel.fn.__name__}",
        **constants,
        **{name: size for name, size in sizes.items() if name in kernel.arg_names},
    )
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    return [vary(result, varying) for result in results]
