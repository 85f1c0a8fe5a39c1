"""Sums that add up, over batches and devices, to exact evaluation metrics."""

import jax
import jax.numpy as jnp
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
