"""The poolings of the published models, [N, H, W, C] -> [N, ceil(H / s), ceil(W / s), C]."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.ops import pooling


def average_pool_3x3(
    x: Float[Array, "N H W C"], implementation: str | None = None
) -> Float[Array, "N -(-H//2) -(-W//2) C"]:
    """Average every second 3x3 window of x padded with zeros, which count in the average.

    ``implementation`` is as in ``local_aggregation``.
    """
    return pooling.average_pool(x, implementation)


def average_pool_2x2(
    x: Float[Array, "N H W C"], strides: int
) -> Float[Array, "N -(-H//{strides}) -(-W//{strides}) C"]:
    """Average 2x2 windows; a window over an odd edge averages its pixels inside (ceil mode)."""
    padding = [(0, size % 2) for size in x.shape[1:3]]
    return nn.avg_pool(x, (2, 2), (strides, strides), padding, count_include_pad=False)


def max_pool_3x3(
    x: Float[Array, "N H W C"], implementation: str | None = None
) -> Float[Array, "N -(-H//2) -(-W//2) C"]:
    """Take the maximum of every second 3x3 window; pixels outside the image never win.

    ``implementation`` is as in ``local_aggregation``.
    """
    return pooling.max_pool(x, implementation)


def blur_pool(
    x: Float[Array, "N H W C"], strides: int
) -> Float[Array, "N -(-H//{strides}) -(-W//{strides}) C"]:
    """Filter with the 3x3 binomial kernel, edges mirrored (reflect padding), and subsample.

    Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486, section 3.2.
    """
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    for axis in (1, 2):
        size = x.shape[axis]
        left, middle, right = (
            jax.lax.slice_in_dim(x, first, size - 2 + first, strides, axis) for first in range(3)
        )
        x = (left + 2 * middle + right) / 4
    return x
