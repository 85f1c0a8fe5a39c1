"""Strided convolutions of few channels, as convolutions of every pixel with more channels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Matrix units take some eight channels at once. Images have 3.
FEW_CHANNELS = 4
_ALIGNMENT = 16


def space_to_depth_conv(
    x: Float[Array, "N H W in"], kernel: Float[Array, "K K in out"], *, strides: int
) -> Float[Array, "N -(-H//{strides}) -(-W//{strides}) out"]:
    """Convolve with ``strides``, x padded with K // 2 zeros on every side, K odd.

    The pixels of blocks of strides x strides become the channels of one pixel, and the kernel is
    laid out for them: the products are the same, but for some with zeros.

    Args:
      x, kernel: of one floating dtype.
      strides: for rows and columns.
    """
    half = kernel.shape[0] // 2
    # Blocks before and after that of the pixel in the middle, which is the first one of it.
    before, after = -(-half // strides), half // strides
    margin = (before * strides - half, (after + 1) * strides - half - 1)
    kernel = jnp.pad(kernel, [margin, margin, (0, 0), (0, 0)])
    kernel = _to_depth(kernel.transpose(3, 0, 1, 2), strides).transpose(1, 2, 3, 0)
    margins = [(before * strides, -size % strides + after * strides) for size in x.shape[1:3]]
    x = _to_depth(jnp.pad(x, [(0, 0), *margins, (0, 0)]), strides)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _to_depth(x, strides):
    """[N, H, W, C] -> [N, H / strides, W / strides, strides**2 * C], and zeros up to alignment."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // strides, strides, w // strides, strides, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], -1)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % _ALIGNMENT)])
