"""What the CoT layers of a network compute for given images: weights and contexts."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float


class CoTContexts(NamedTuple):
    """The weights and contexts that a CoT layer computed.

    The layer's output is ``share * dynamic + (1 - share) * static``, ``share`` broadcast over
    pixels.

    Attributes:
      weights: [N, H, W, G, K, K, Cw], normalised: the weights with which each pixel sums its K x K
        neighbours. Channel c of a group's C / G channels uses weight channel ``c mod Cw``.
      static: [N, H, W, C], the context from the K x K convolution.
      dynamic: [N, H, W, C], the context from the sums with ``weights``.
      share: [N, C], between 0 and 1, of the dynamic context in the output.
    """

    weights: Float[Array, "N H W G K K Cw"]
    static: Float[Array, "N H W C"]
    dynamic: Float[Array, "N H W C"]
    share: Float[Array, "N C"]


def cot_contexts(
    model: nn.Module, variables: Mapping[str, Any], images: Float[Array, "N H W channels"]
) -> tuple[Float[Array, "N ..."], dict[str, CoTContexts]]:
    """Apply a network in inference, and return the contexts of its CoT layers with its output.

    The layers run unfused, since fused kernels do not store these arrays: the output differs from
    the usual one by rounding.

    Args:
      model: a ``CoTNet``, or any module that contains CoT layers.
      variables: {"params", "batch_stats"} of the model.
      images: [N, H, W, channels], normalised.

    Returns:
      (the model's output, {path: contexts}), with a path such as "stage1_block0/cot" for each CoT
      layer, in natural order (block9 before block10). Arrays are in the model's dtype.
    """
    outputs, state = _apply(model, variables, images)
    layers = dict(_find_layers(state.get("intermediates", {}), ()))
    return outputs, {path: layers[path] for path in sorted(layers, key=_natural_order)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, variables, images):
    return model.apply(variables, images, mutable=["intermediates"])


def _natural_order(path: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _find_layers(tree, path) -> Iterator[tuple[str, CoTContexts]]:
    """Yield (path, contexts) of every CoT layer in the tree of intermediates."""
    if "aggregation_weights" in tree:
        (weights,), (static,), (dynamic,), (share,) = (
            tree[name] for name in ("aggregation_weights", "static", "dynamic", "dynamic_share")
        )
        *pixels_and_group, positions, weight_channels = weights.shape
        size = round(positions**0.5)
        weights = weights.reshape(*pixels_and_group, size, size, weight_channels)
        yield "/".join(path), CoTContexts(weights, static, dynamic, share)
        return
    for name, subtree in tree.items():
        if isinstance(subtree, dict):
            yield from _find_layers(subtree, (*path, name))
