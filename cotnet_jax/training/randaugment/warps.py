"""Operations that move pixels: one affine warp with Pillow's bicubic interpolation."""

import jax
import jax.numpy as jnp

from cotnet_jax.data.randaugment import FILL, OP_NAMES
from cotnet_jax.training.randaugment.draw import Operations, is_any_of
from cotnet_jax.training.randaugment.selected import replace_selected

NAMES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_TAPS = (-1, 0, 1, 2)


def apply(images: jax.Array, operations: Operations) -> jax.Array:
    """Apply operations of ``NAMES``, and no others; images and result uint8 [B, H, W, 3]."""
    selected = is_any_of(operations, NAMES)
    return replace_selected(images, selected, _warp_each, (images, operations))


def _warp_each(images: jax.Array, operations: Operations) -> jax.Array:
    _, height, width, _ = images.shape
    return jax.vmap(_warp)(images, *_shifts(height, width, operations))


def _shifts(height: int, width: int, operations: Operations) -> tuple[jax.Array, jax.Array]:
    """Return how far from its own place each pixel comes from, x and y, float32 [B, H, W].

    Shifts are small where places are large, and so have more of float32's digits.
    """

    def value(name: str) -> jax.Array:
        chosen = operations.op == OP_NAMES.index(name)
        return jnp.where(chosen, operations.value, 0)[:, None, None]

    x = jnp.arange(width, dtype=jnp.float32) + 0.5
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5)[:, None]
    angle = jnp.radians(value("Rotate"))
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    from_center_x, from_center_y = x - width / 2, y - height / 2
    shift_x = (cosine - 1) * from_center_x - sine * from_center_y
    shift_y = sine * from_center_x + (cosine - 1) * from_center_y
    shift_x += value("ShearX") * y + value("TranslateX")
    shift_y += value("ShearY") * x + value("TranslateY")
    return shift_x, shift_y


def _warp(image: jax.Array, shift_x: jax.Array, shift_y: jax.Array) -> jax.Array:
    """Warp uint8 [H, W, 3] by shifts [H, W]; what comes from outside gets the fill colour."""
    height, width = image.shape[:2]
    columns, rows = jnp.arange(width), jnp.arange(height)[:, None]
    whole_x, whole_y = jnp.floor(shift_x), jnp.floor(shift_y)
    part_x, part_y = ((a - b)[..., None] for a, b in ((shift_x, whole_x), (shift_y, whole_y)))
    first_x, first_y = columns + whole_x.astype(jnp.int32), rows + whole_y.astype(jnp.int32)

    def pixel(tap_y: int, tap_x: int) -> jax.Array:
        y, x = (first_y + tap_y).clip(0, height - 1), (first_x + tap_x).clip(0, width - 1)
        return image.at[y, x].get(mode="promise_in_bounds").astype(jnp.float32)

    lines = [_cubic([pixel(tap_y, tap_x) for tap_x in _TAPS], part_x) for tap_y in _TAPS]
    # Pillow cuts the fraction off.
    warped = _cubic(lines, part_y).clip(0, 255).astype(jnp.uint8)
    x, y = columns + 0.5 + shift_x, rows + 0.5 + shift_y
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside[..., None], warped, jnp.asarray(FILL, jnp.uint8))


def _cubic(taps: list[jax.Array], part: jax.Array) -> jax.Array:
    """Interpolate between the second and the third of four taps: cubic convolution with a = -1.

    Source: Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4,
    with Pillow's a. In this form equal taps give their value without rounding.
    """
    first, second, third, fourth = taps
    linear = third - first
    quadratic = 2 * (first - second) + third - fourth
    cubic = second - first + fourth - third
    return second + part * (linear + part * (quadratic + part * cubic))
