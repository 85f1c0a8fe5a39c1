"""Local aggregation: every pixel sums its neighbours with weights of its own.

Method: Li et al., "Contextual Transformer Networks for Visual Recognition", arXiv 2107.12292,
section 3.2, equation 3; the sharing of a weight by several channels is that of the published code.

For values ``x [N, H, W, C]``, weights ``w [N, H, W, G, K*K, Cw]`` and zero padding ``K // 2``::

    y[n, h, v, g, s, c] = sum over taps (i, j) of
        w[n, h, v, g, i*K + j, c] * x[n, h + i - K//2, v + j - K//2, g, s, c]

where the C channels are read as ``[G, S, Cw]``: G groups, and in each of them S channels, Cw apart,
that share one weight. CoTNet has G = 1 and S = 8, CoTNeXt G = 2 and S = 8.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.ops.dispatch import check_implementation, dispatch
from cotnet_jax.ops.varying import align

# The kernels' module; it needs JAX with CUDA.
LAUNCH = "cotnet_jax.ops.local_aggregation.triton.launch"


def local_aggregation(
    values: Float[Array, "N H W C"],
    weights: Float[Array, "N H W G KK Cw"],
    *,
    implementation: str | None = None,
) -> Float[Array, "N H W C"]:
    """Return the sum of each pixel's K x K neighbourhood, with that pixel's own weights.

    Sums are taken in float32, or in float64 for float64 inputs, and have gradients of their own
    (reverse mode only).

    Args:
      values: [N, H, W, C], any floating dtype.
      weights: [N, H, W, G, K*K, Cw], K odd, taps in row-major order; G * Cw divides C.
        Channel c of a group's C / G uses weight channel ``c mod Cw`` of that group.
      implementation: None takes the Triton kernel where it runs (NVIDIA GPUs; bfloat16, float16
        and float32) and XLA elsewhere; "xla" and "triton" force one. ``jax.export`` needs "xla".

    Returns:
      [N, H, W, C] in the dtype of ``values``.

    Raises:
      ValueError: the shapes do not belong together; the message says which part.
      TypeError: an input is not floating point, or not of a dtype that the kernel takes.
      ImportError: "triton" without JAX for CUDA, jax-triton or triton.
    """
    check_inputs("local_aggregation", values, weights)
    check_implementation("local_aggregation", implementation, values, weights)
    return _aggregate(implementation, *align(values, weights))


def check_inputs(operation: str, values: jax.Array, weights: jax.Array) -> None:
    """Raise TypeError or ValueError where values and weights do not belong together."""
    for name, array in (("values", values), ("weights", weights)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{operation}: {name} must be floating point, not {array.dtype}")
    shapes = f"values {values.shape}, weights {weights.shape}"
    if values.ndim != 4 or weights.ndim != 6:
        raise ValueError(
            f"{operation} takes values [N, H, W, C] and weights [N, H, W, groups, K*K, "
            f"channels per weight group], not {shapes}"
        )
    if values.shape[:3] != weights.shape[:3]:
        raise ValueError(f"{operation}: N, H, W differ: {shapes}")
    groups, taps, weight_channels = weights.shape[3:]
    kernel_size = math.isqrt(taps)
    if kernel_size**2 != taps or kernel_size % 2 == 0:
        raise ValueError(
            f"{operation}: {taps} taps are not the square of an odd kernel size: {shapes}"
        )
    if not groups * weight_channels or values.shape[3] % (groups * weight_channels):
        raise ValueError(
            f"{operation}: {values.shape[3]} channels are not a multiple of {groups} groups "
            f"x {weight_channels} weight channels: {shapes}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _aggregate(implementation, values, weights):
    return dispatch(LAUNCH, implementation, "forward", xla_forward, values, weights)


def _aggregate_fwd(implementation, values, weights):
    return _aggregate(implementation, values, weights), (values, weights)


def _aggregate_bwd(implementation, residuals, gradient):
    return dispatch(LAUNCH, implementation, "backward", xla_backward, *residuals, gradient)


_aggregate.defvjp(_aggregate_fwd, _aggregate_bwd)


def _split(array, weights):
    """[N, H, W, C] -> [N, H, W, G, S, Cw] in the dtype of the sums."""
    groups, _, weight_channels = weights.shape[3:]
    dtype = jnp.promote_types(jnp.promote_types(array.dtype, weights.dtype), jnp.float32)
    share = array.shape[3] // (groups * weight_channels)
    return array.astype(dtype).reshape(*array.shape[:3], groups, share, weight_channels)


def _pad(array, kernel_size):
    """Put zeros of kernel_size // 2 around the rows and columns of [N, H, W, ...]."""
    margin = (kernel_size // 2, kernel_size // 2)
    return jnp.pad(array, [(0, 0), margin, margin] + [(0, 0)] * (array.ndim - 3))


def _window(padded, row, column, like):
    """Return the part of a padded array that a tap at (row, column) sees, as large as ``like``."""
    return padded[:, row : row + like.shape[1], column : column + like.shape[2]]


def xla_forward(values, weights):
    """Return the aggregation.

    It is a sum of products of shifted slices, which XLA fuses into one loop over the output.
    """
    kernel_size = math.isqrt(weights.shape[4])
    split = _split(values, weights)
    padded = _pad(split, kernel_size)
    total = jnp.zeros_like(split)
    for tap in range(kernel_size**2):
        window = _window(padded, *divmod(tap, kernel_size), like=values)
        total += weights[..., tap, None, :].astype(split.dtype) * window
    return total.reshape(values.shape).astype(values.dtype)


def xla_backward(values, weights, gradient):
    """Return the gradients of values and weights, given the gradient of the output.

    Written out because autodiff's form was three times as slow on a CPU: the sum over the
    channels that share a weight is unrolled, so that it stays elementwise.
    """
    kernel_size = math.isqrt(weights.shape[4])
    split_gradient = _split(gradient, weights)
    padded_values = _pad(_split(values, weights), kernel_size)
    padded_gradient = _pad(split_gradient, kernel_size)
    padded_weights = _pad(weights, kernel_size)
    values_gradient = jnp.zeros_like(split_gradient)
    weights_gradient = []
    for tap in range(kernel_size**2):
        row, column = divmod(tap, kernel_size)
        # A value reaches the output from the other side: its tap's offset is mirrored.
        mirrored = (kernel_size - 1 - row, kernel_size - 1 - column)
        weight = _window(padded_weights[..., tap, None, :], *mirrored, like=values)
        values_gradient += weight.astype(split_gradient.dtype) * _window(
            padded_gradient, *mirrored, like=values
        )
        product = split_gradient * _window(padded_values, row, column, like=values)
        shares = (product[..., share, :] for share in range(product.shape[4]))
        weights_gradient.append(functools.reduce(jnp.add, shares))
    return (
        values_gradient.reshape(values.shape).astype(values.dtype),
        jnp.stack(weights_gradient, axis=4).astype(weights.dtype),
    )
