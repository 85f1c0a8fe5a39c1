"""Sums that add up, over batches and devices, to exact evaluation metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def evaluation_counts(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Count the images of a batch that are classified correctly, and sum their losses.

    A class outranks the label's when its logit is larger, or equal with a lower index, as
    ``jax.lax.top_k`` orders them; a logit that is not a number outranks all.

    Args:
      logits: [N, classes], any floating dtype.
      labels: int32 [N]; anything where ``mask`` is False.
      mask: bool [N], False for the padding that fills the last batch.

    Returns:
      {"count", "top1", "top5"} int32 [] and {"loss"} float32 [], the summed cross entropy in nats.
      With fewer than five classes top5 counts the label among all of them.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    outranks = jnp.where(index < labels[:, None], ~(logits < own), ~(logits <= own))
    rank = jnp.sum(outranks & (index != labels[:, None]), axis=-1)
    known = mask & ~jnp.isnan(own[:, 0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "count": jnp.sum(mask, dtype=jnp.int32),
        "top1": jnp.sum(known & (rank < 1), dtype=jnp.int32),
        "top5": jnp.sum(known & (rank < 5), dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(mask, losses, 0), dtype=jnp.float32),
    }


def real_label_counts(logits: jax.Array, real: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Count the images of a batch whose top class is one of their ReaL labels.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159, section 3.2. The top class is
    that of ``evaluation_counts``' top1; images without a label are not counted.

    Args:
      logits: [N, classes], any floating dtype.
      real: int32 [N, K], classes, padded with -1.
      mask: bool [N], False for the padding that fills the last batch.

    Returns:
      {"real_count", "real_top1"}, int32 [].
    """
    labelled = mask.astype(bool) & (real >= 0).any(-1)
    known = labelled & ~jnp.isnan(logits).any(-1)
    right = (real == jnp.argmax(logits, axis=-1)[:, None]).any(-1)
    return {
        "real_count": jnp.sum(labelled, dtype=jnp.int32),
        "real_top1": jnp.sum(known & right, dtype=jnp.int32),
    }


def confusion_counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Count the images of a batch by label and top class, the top1 of ``evaluation_counts``.

    Args:
      logits: [N, classes], any floating dtype.
      labels: int32 [N]; anything where ``mask`` is False.
      mask: bool [N], False for the padding that fills the last batch.

    Returns:
      {"images"}, int32 [classes, classes]: row the label, column the top class.
    """
    classes = logits.shape[-1]
    labels = jnp.where(mask.astype(bool), labels, 0)
    counts = jnp.zeros((classes, classes), jnp.int32)
    return {"images": counts.at[labels, jnp.argmax(logits, -1)].add(mask.astype(jnp.int32))}


def calibration_counts(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, bins: int
) -> dict[str, jax.Array]:
    """Count the images of a batch by their confidence, the probability of the top class.

    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 2: bin m of M,
    counted from 1, has the confidences above (m - 1) / M and up to m / M.

    Args:
      logits: [N, classes], any floating dtype.
      labels: int32 [N]; anything where ``mask`` is False.
      mask: bool [N], False for the padding that fills the last batch.
      bins: M.

    Returns:
      {"images", "right"} int32 [M], and {"confidence"} float32 [M], the sum in each bin.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    confidence = jnp.max(probabilities, axis=-1)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    kept = mask.astype(bool)
    right = kept & (jnp.argmax(logits, axis=-1) == labels)

    def sums(values, dtype):
        return jnp.zeros(bins, dtype).at[bin_of].add(values.astype(dtype))

    return {
        "images": sums(kept, jnp.int32),
        "right": sums(right, jnp.int32),
        "confidence": sums(jnp.where(kept, confidence, 0), jnp.float32),
    }


def mean_class_accuracy(confusion: np.ndarray) -> float:
    """Return the mean over classes of each one's accuracy, 0..1, from [classes, classes] counts.

    Classes without an image are left out.
    """
    images = confusion.sum(axis=1)
    return float(np.mean(confusion.diagonal()[images > 0] / images[images > 0]))


def expected_calibration_error(
    images: np.ndarray, right: np.ndarray, confidence: np.ndarray
) -> float:
    """Return the ECE, 0..1: the mean over images of |accuracy - confidence| of their bin.

    Guo et al., arXiv 1706.04599, equation 3.

    Args:
      images, right, confidence: [M], summed from ``calibration_counts``.
    """
    return float(np.abs(right - np.asarray(confidence, np.float64)).sum() / images.sum())
