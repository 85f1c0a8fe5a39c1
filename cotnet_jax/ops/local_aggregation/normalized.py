"""Local aggregation that normalises its weights while it reads them.

Group normalisation (Wu and He, arXiv 1803.08494, equation 7) of the weights, with a group for each
weight channel of an image over all its pixels and taps, followed by ``local_aggregation``. On
NVIDIA GPUs the normalised weights are never stored: the kernels apply the normalisation to what
they read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cotnet_jax.ops.dispatch import check_implementation, dispatch
from cotnet_jax.ops.local_aggregation.plain import (
    LAUNCH,
    check_inputs,
    xla_backward,
    xla_forward,
)
from cotnet_jax.ops.varying import align

NAME = "normalized_local_aggregation"


def normalized_local_aggregation(
    values: Float[Array, "N H W C"],
    raw_weights: Float[Array, "N H W G KK Cw"],
    scale: Float[Array, "G KK Cw"],
    bias: Float[Array, "G KK Cw"],
    *,
    epsilon: float = 1e-5,
    output_scale: Float[Array, " C"] | None = None,
    output_shift: Float[Array, " C"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N H W C"]:
    """Return ``local_aggregation`` of the values with group-normalised weights.

    Statistics, normalisation and sums are taken in at least float32. Gradients are those of the
    whole composition (reverse mode only).

    Args:
      values: [N, H, W, C], any floating dtype.
      raw_weights: [N, H, W, G, K*K, Cw], before their normalisation over H, W and K*K.
      scale, bias: [G, K*K, Cw], of the normalisation.
      epsilon: added to the variance.
      output_scale, output_shift: [C], both or none. With them the result is
        SiLU(output_scale * y + output_shift) of the aggregation y: a batch normalisation by
        running statistics and its activation.
      implementation: as in ``local_aggregation``. On NVIDIA GPUs some of the kernels have programs
        that wait for each other; with COTNET_JAX_COOPERATIVE_KERNELS=0 in the environment when a
        shape is first traced, two kernels run one after the other in place of each.

    Returns:
      [N, H, W, C] in the dtype of ``values``.

    Raises:
      ValueError, TypeError, ImportError: as ``local_aggregation``.
    """
    check_inputs(NAME, values, raw_weights)
    check_implementation(NAME, implementation, values, raw_weights)
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != raw_weights.shape[3:]:
            raise ValueError(f"{NAME}: {name} must be {raw_weights.shape[3:]}, not {array.shape}")
    dtype = jnp.promote_types(raw_weights.dtype, jnp.float32)
    operands = align(values, raw_weights, scale.astype(dtype), bias.astype(dtype))
    if output_scale is None and output_shift is None:
        return _aggregate(implementation, epsilon, *operands)
    affine = []
    for name, array in (("output_scale", output_scale), ("output_shift", output_shift)):
        if array is None or array.shape != values.shape[3:]:
            shape = None if array is None else array.shape
            raise ValueError(f"{NAME}: {name} must be {values.shape[3:]}, not {shape}")
        affine.append(array.astype(dtype))
    return _activated(implementation, epsilon, *operands, *align(values, *affine)[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _aggregate(implementation, epsilon, *operands):
    return _aggregate_fwd(implementation, epsilon, *operands)[0]


def _aggregate_fwd(implementation, epsilon, values, raw, scale, bias):
    operands = (values, raw, scale, bias)
    y, mean, rstd = dispatch(
        LAUNCH,
        implementation,
        "normalized_forward",
        xla_normalized_forward,
        *operands,
        epsilon=epsilon,
    )
    return y, (values, raw, mean, rstd, scale, bias)


def _aggregate_bwd(implementation, epsilon, residuals, gradient):
    del epsilon
    values, raw, *normalization = residuals
    operands = (values, raw, gradient, *normalization)
    return dispatch(
        LAUNCH, implementation, "normalized_backward", xla_normalized_backward, *operands
    )


_aggregate.defvjp(_aggregate_fwd, _aggregate_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activated(implementation, epsilon, *operands):
    return dispatch(
        LAUNCH,
        implementation,
        "activated_forward",
        xla_activated_forward,
        *operands,
        epsilon=epsilon,
    )


def _activated_fwd(implementation, epsilon, *operands):
    return _activated(implementation, epsilon, *operands), operands


def _activated_bwd(implementation, epsilon, operands, gradient):
    def composed(*operands):
        y = _aggregate(implementation, epsilon, *operands[:4])
        return _activate(y, *operands[4:])

    return jax.vjp(composed, *operands)[1](gradient)


_activated.defvjp(_activated_fwd, _activated_bwd)


def group_statistics(raw, epsilon):
    """Return mean and rstd of every group, [N, G, 1, Cw], in at least float32.

    rstd is 1 / sqrt(variance + epsilon).
    """
    raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
    axes = (1, 2, 4)
    mean, mean_of_squares = raw.mean(axes), jnp.square(raw).mean(axes)
    # Rounding may leave a tiny negative variance where all weights are equal.
    variance = jnp.maximum(mean_of_squares - jnp.square(mean), 0)
    return mean[:, :, None], lax.rsqrt(variance + epsilon)[:, :, None]


def _per_pixel(array):
    """[N, G, K*K or 1, Cw] -> [N, 1, 1, G, K*K or 1, Cw]."""
    return array[:, None, None]


def _activate(y, output_scale, output_shift):
    return jax.nn.silu(output_scale * y + output_shift).astype(y.dtype)


def normalize(raw, mean, rstd, scale, bias):
    """Return the normalised weights, from statistics as ``group_statistics`` gives them."""
    factor = scale * rstd
    shift = bias - mean * factor
    return (raw * _per_pixel(factor) + _per_pixel(shift)).astype(raw.dtype)


def xla_normalized_forward(values, raw, scale, bias, epsilon):
    """Return the aggregation, and mean and rstd as ``group_statistics`` gives them."""
    mean, rstd = group_statistics(raw, epsilon)
    return xla_forward(values, normalize(raw, mean, rstd, scale, bias)), mean, rstd


def xla_activated_forward(values, raw, scale, bias, output_scale, output_shift, epsilon):
    """Return the aggregation with its epilogue."""
    y, _, _ = xla_normalized_forward(values, raw, scale, bias, epsilon)
    return _activate(y, output_scale, output_shift)


def xla_normalized_backward(values, raw, gradient, mean, rstd, scale, bias):
    """Return the gradients of values, raw, scale and bias."""
    weights = normalize(raw, mean, rstd, scale, bias)
    values_gradient, weights_gradient = xla_backward(values, weights, gradient)
    dtype = mean.dtype
    wide = weights_gradient.astype(dtype)
    normal = (raw.astype(dtype) - _per_pixel(mean)) * _per_pixel(rstd)
    sums, products = wide.sum((1, 2)), (wide * normal).sum((1, 2))
    count = raw.shape[1] * raw.shape[2] * raw.shape[4]
    mean_gradient = (scale * sums).sum(2, keepdims=True) / count
    mean_product = (scale * products).sum(2, keepdims=True) / count
    raw_gradient = _per_pixel(rstd) * (
        scale * wide - _per_pixel(mean_gradient) - normal * _per_pixel(mean_product)
    )
    return values_gradient, raw_gradient.astype(raw.dtype), products.sum(0), sums.sum(0)
