"""A look inside a network: what its CoT layers made of given images."""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax


class CoTContexts(NamedTuple):
    """What a CoT layer computed, channel for channel.

    The layer's result is ``share * dynamic + (1 - share) * static``.

    Attributes:
      weights: [N, H, W, G, K, K, C/8/G], with which each pixel sums the K x K values around it;
        channel c of a group's C/G channels has the weights at index ``c mod (C/8/G)`` of it.
      static: [N, H, W, C], the K x K convolution's context.
      dynamic: [N, H, W, C], the context summed with ``weights``.
      share: [N, C], 0..1, how much of the result is the dynamic context.
    """

    weights: jax.Array
    static: jax.Array
    dynamic: jax.Array
    share: jax.Array


def cot_contexts(
    model: nn.Module, variables: dict, images: jax.Array
) -> tuple[jax.Array, dict[str, CoTContexts]]:
    """Applies a network in inference, and keeps what is inside its CoT layers.

    Fused kernels never store these arrays, so the layers work without them here: the logits are
    the usual ones but for rounding.

    Args:
      model: a ``CoTNet``, or any module that holds CoT layers.
      variables: its {"params", "batch_stats"}.
      images: normalised, [N, H, W, channels].

    Returns:
      (what the model returns, {path of the layer, such as "stage1_block0/cot": its contexts}),
      paths sorted, block10 after block9; arrays in the model's dtype.
    """
    outputs, state = _apply(model, variables, images)
    layers = dict(_layers(state.get("intermediates", {}), ()))
    return outputs, {path: layers[path] for path in sorted(layers, key=_by_number)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, variables, images):
    return model.apply(variables, images, mutable=["intermediates"])


def _by_number(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _layers(tree, path):
    """(path, contexts) of every CoT layer in the tree of what modules have sown."""
    if "aggregation_weights" in tree:
        (weights,), (static,), (dynamic,), (share,) = (
            tree[name] for name in ("aggregation_weights", "static", "dynamic", "dynamic_share")
        )
        *pixels, groups, taps, weight_channels = weights.shape
        size = round(taps**0.5)
        weights = weights.reshape(*pixels, groups, size, size, weight_channels)
        yield "/".join(path), CoTContexts(weights, static, dynamic, share)
        return
    for name, inside in tree.items():
        if isinstance(inside, dict):
            yield from _layers(inside, (*path, name))
