"""Normalise pixels by mean and standard deviation, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Return (images - mean) / std.

    Args:
      images: uint8 or float [..., C], pixel values 0..255.
      mean, std: C numbers each, on the 0..1 scale.
      dtype: of the result; the arithmetic is at least float32.

    Returns:
      [..., C] of the given dtype.
    """
    compute = jnp.promote_types(compute_dtype(images), dtype)
    scale = 255 * jnp.asarray(std, compute)
    return ((images.astype(compute) - 255 * jnp.asarray(mean, compute)) / scale).astype(dtype)


def compute_dtype(images: jax.Array) -> jnp.dtype:
    """Return float64 for float64 images and float32 for all others."""
    return jnp.promote_types(images.dtype, jnp.float32)
