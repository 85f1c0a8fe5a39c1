"""Mixup, CutMix and label smoothing of a whole batch, inside the jitted step.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412; Yun et al.,
"CutMix", arXiv 1905.04899; label smoothing: Szegedy et al., arXiv 1512.00567, section 7. Each
device mixes its own batch with the same batch reversed, all of it by one kind and one lambda.
"""

import jax
import jax.numpy as jnp

from cotnet_jax.data.normalize import compute_dtype


def mix_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    probability: float,
    cutmix_probability: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
    """Mix a batch with itself reversed, and make its soft targets.

    Args:
      key: random key of this step and device.
      images: [B, H, W, C], uint8 or float, values 0..255.
      labels: [B], integer classes.
      num_classes: length of a target.
      probability: probability that the batch is mixed at all.
      cutmix_probability: probability that a mixed batch is CutMix; unused unless both kinds are on.
      mixup_alpha, cutmix_alpha: lambda is Beta(alpha, alpha); 0 turns that kind off.
      label_smoothing: fraction of a target spread evenly over all classes.

    Returns:
      images [B, H, W, C], values 0..255, and targets [B, num_classes] whose rows sum to 1; both
      float32, or float64 for float64 images.
    """
    dtype = compute_dtype(images)
    images = images.astype(dtype)
    targets = smooth_one_hot(labels, num_classes, label_smoothing, dtype)
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(
            f"config.mixing: mixup_alpha = {mixup_alpha} and cutmix_alpha = {cutmix_alpha} must "
            "not be negative; 0 turns that kind of mixing off"
        )
    if probability <= 0 or mixup_alpha == cutmix_alpha == 0:
        return images, targets

    height, width = images.shape[1:3]
    mixed_key, kind_key, lam_key, y_key, x_key = jax.random.split(key, 5)
    # Where only one kind is on, every mixed batch is of that kind.
    if cutmix_alpha == 0:
        cutmix_probability = 0.0
    elif mixup_alpha == 0:
        cutmix_probability = 1.0
    is_mixed = jax.random.bernoulli(mixed_key, probability)
    is_cutmix = jax.random.bernoulli(kind_key, cutmix_probability)
    alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha).astype(dtype)
    drawn = jax.random.beta(lam_key, alpha, alpha, dtype=dtype)
    center_y = jax.random.randint(y_key, (), 0, height)
    center_x = jax.random.randint(x_key, (), 0, width)

    y0, y1, x0, x1, cutmix_lam = cutmix_box(drawn, center_y, center_x, height, width)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    outside = ~((rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1))
    # One formula for every case: each pixel's lambda, which is 0 or 1 for CutMix.
    lam = jnp.where(is_mixed, jnp.where(is_cutmix, cutmix_lam, drawn), 1)
    pixel_lam = jnp.where(is_mixed, jnp.where(is_cutmix, outside.astype(dtype), drawn), 1)
    return blend(images, pixel_lam[None, :, :, None]), blend(targets, lam)


def blend(batch: jax.Array, lam: jax.Array) -> jax.Array:
    """Return batch * lam + reversed batch * (1 - lam), [B, ...]; lam broadcasts against batch."""
    return batch * lam + batch[::-1] * (1 - lam)


def cutmix_box(
    lam: jax.Array, center_y: jax.Array, center_x: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the rectangle that CutMix takes from the other image.

    Args:
      lam: fraction of the image that should remain, 0..1, float.
      center_y, center_x: the rectangle's centre in pixels, integers.
      height, width: of the image, in pixels.

    Returns:
      (y0, y1, x0, x1, lam): half-open ranges of rows and columns, clipped at the borders, and the
      fraction of the image that does remain.
    """
    side = jnp.sqrt(1 - lam)
    half_h = (height * side).astype(jnp.int32) // 2
    half_w = (width * side).astype(jnp.int32) // 2
    y0, y1 = (jnp.clip(center_y + d, 0, height) for d in (-half_h, half_h))
    x0, x1 = (jnp.clip(center_x + d, 0, width) for d in (-half_w, half_w))
    remaining = 1 - ((y1 - y0) * (x1 - x0)).astype(side.dtype) / (height * width)
    return y0, y1, x0, x1, remaining


def smooth_one_hot(
    labels: jax.Array, num_classes: int, smoothing: float, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Return targets [B, num_classes] for labels [B]: smoothing / num_classes everywhere, and
    1 - smoothing more for the label's class."""
    off = smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes, dtype=dtype) * (1 - smoothing) + off
