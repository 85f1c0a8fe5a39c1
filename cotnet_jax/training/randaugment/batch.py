"""RandAugment of a batch: the operations of ``data.randaugment``, as one program of fixed shapes.

Source: Cubuk et al., "RandAugment", arXiv 1909.13719, in the form of ``data.randaugment``. Of the
sixteen operations an image gets few, so each kind of operation is one function of all parameters
(a table of 256 entries, a blend, a warp, a rectangle), computed only for the images that drew it.
"""

import jax
import jax.numpy as jnp

from cotnet_jax.data.randaugment import FILL, RandAugment
from cotnet_jax.training.randaugment import blends, tables, warps
from cotnet_jax.training.randaugment.draw import Operations, draw, is_any_of


def randaugment_batch(key: jax.Array, images: jax.Array, settings: RandAugment) -> jax.Array:
    """Augment every image by operations of its own.

    Operations, probabilities and magnitudes are distributed as on the host, and have the same
    meaning. Given the same ones, pixels are equal to the host's for all operations but Rotate,
    ShearX, ShearY, TranslateX and TranslateY, whose cubic interpolation is in single precision: at
    most 1 % of the pixels differ, by one level.

    Args:
      key: random key of this step and device.
      images: uint8 [B, H, W, 3], RGB.
      settings: magnitude and number of operations.

    Returns:
      uint8 [B, H, W, 3].
    """
    batch, height, width, _ = images.shape

    def apply_next(images, operations):
        return apply_operations(images, operations), None

    operations = draw(key, batch, height, width, settings)
    images, _ = jax.lax.scan(apply_next, images, operations)
    return images


def apply_operations(images: jax.Array, operations: Operations) -> jax.Array:
    """Apply one operation to each image.

    Args:
      images: uint8 [B, H, W, 3], RGB.
      operations: B of them.

    Returns:
      uint8 [B, H, W, 3].
    """
    # An image is changed by one of these at most, so that their order has no meaning.
    for apply in (tables.apply, blends.apply, warps.apply, _cutout):
        images = apply(images, operations)
    return images


def _cutout(images: jax.Array, operations: Operations) -> jax.Array:
    def is_covered(length: int, center: jax.Array) -> jax.Array:
        first = jnp.maximum(0, center - half).astype(jnp.int32)
        last = jnp.minimum(length, first + 2 * half)
        pixels = jnp.arange(length)
        return (pixels >= first[:, None]) & (pixels <= last[:, None])

    height, width = images.shape[1:3]
    half = operations.value.astype(jnp.int32)
    columns = is_covered(width, operations.center_xy[:, 0])
    rows = is_covered(height, operations.center_xy[:, 1])
    rows &= is_any_of(operations, ("Cutout",))[:, None]
    covered = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(covered, jnp.asarray(FILL, jnp.uint8), images)
