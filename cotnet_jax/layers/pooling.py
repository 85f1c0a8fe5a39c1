"""The poolings of the published models, on [N, H, W, C]."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def average_pool_3x3(x: jax.Array, strides: int) -> jax.Array:
    """Mean of 3x3 with one pixel of zeros around, which the mean counts."""
    return nn.avg_pool(x, (3, 3), (strides, strides), ((1, 1), (1, 1)))


def average_pool_2x2(x: jax.Array, strides: int) -> jax.Array:
    """Mean of 2x2; at an odd edge, of the pixels that are there (``ceil`` mode)."""
    padding = [(0, size % 2) for size in x.shape[1:3]]
    return nn.avg_pool(x, (2, 2), (strides, strides), padding, count_include_pad=False)


def max_pool_3x3(x: jax.Array, strides: int) -> jax.Array:
    """Maximum of 3x3 with one pixel of padding, which never wins."""
    return nn.max_pool(x, (3, 3), (strides, strides), ((1, 1), (1, 1)))


def blur_pool(x: jax.Array, strides: int) -> jax.Array:
    """Binomial 3x3 filter, then subsampling, with the image mirrored about its edge pixels.

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
