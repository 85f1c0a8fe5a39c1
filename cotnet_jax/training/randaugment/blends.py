"""Operations that blend an image with a version of less colour or sharpness, as Pillow's blend."""

import jax
import jax.numpy as jnp

from cotnet_jax.data.randaugment import OP_NAMES
from cotnet_jax.training.randaugment.draw import Operations, is_any_of
from cotnet_jax.training.randaugment.selected import replace_selected

NAMES = ("Color", "Sharpness")
# Weights of red, green and blue in grey (ITU-R BT.601), in 65,536ths.
_GREY_WEIGHTS = (19595, 38470, 7471)


def apply(images: jax.Array, operations: Operations) -> jax.Array:
    """Apply operations of ``NAMES``, and no others; images and result uint8 [B, H, W, 3]."""
    selected = is_any_of(operations, NAMES)
    return replace_selected(images, selected, _blend_each, (images, operations))


def _blend_each(images: jax.Array, operations: Operations) -> jax.Array:
    is_color = (operations.op == OP_NAMES.index("Color"))[:, None, None, None]
    degenerate = jnp.where(is_color, to_grey(images)[..., None], _smooth(images))
    return blend(degenerate, images.astype(jnp.int32), operations.value[:, None, None, None])


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Return degenerate + factor * (image - degenerate), cut to whole numbers in 0..255.

    The product is rounded to float32 and then the sum, as the host does, also where the compiler
    would make both one operation with one rounding.

    Args:
      degenerate, image: integers, 0..255.
      factor: float32.

    Returns:
      uint8, of the shape that they broadcast to.
    """
    difference = (image - degenerate).astype(jnp.float32)
    # A part of 16 bits and the rest have exact products with numbers of 8 bits.
    bits = jax.lax.bitcast_convert_type(factor, jnp.uint32) & jnp.uint32(0xFFFFFF00)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    product = high * difference + (factor - high) * difference
    return jnp.clip(degenerate + product, 0, 255).astype(jnp.uint8)


def to_grey(images: jax.Array) -> jax.Array:
    """Return the grey image as Pillow's mode "L", int32 [B, H, W], of uint8 [B, H, W, 3]."""
    red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
    weights = _GREY_WEIGHTS
    return (red * weights[0] + green * weights[1] + blue * weights[2] + 0x8000) >> 16


def _smooth(images: jax.Array) -> jax.Array:
    """Return Pillow's filter SMOOTH: the centre five times, its neighbours once; int32.

    The outermost pixels stay as they are.
    """
    values = images.astype(jnp.int32)
    height, width = values.shape[1:3]
    if height < 3 or width < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    total += 4 * values[:, 1:-1, 1:-1]
    # Thirteenths are never halfway between two numbers.
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)
