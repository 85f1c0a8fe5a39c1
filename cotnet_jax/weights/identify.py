"""Identify the model that a PyTorch state dict belongs to, by its names and shapes."""

import collections
import re
from collections.abc import Iterable, Mapping

from cotnet_jax.models.variants import VARIANTS, Variant

Shapes = Mapping[str, tuple[int, ...]]


_BLOCK = re.compile(r"((?:.*\.)?)layer[1-4]\.\d{1,4}\.")
_OUTERMOST = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")


def find_prefix(names: Iterable[str]) -> str:
    """Return what stands before the names of a network, such as "model." or "backbone."; or "".

    Raises:
      ValueError: the names are those of several networks.
    """
    found = collections.Counter(block[1] for name in names if (block := _BLOCK.match(name)))
    if "" in found:
        return ""
    if len(found) > 1:
        listed = ", ".join(f"'{prefix}'" for prefix, _ in found.most_common(5))
        raise ValueError(
            f"holds {len(found)} networks, whose names begin with {listed}: save the state dict of "
            "one of them alone"
        )
    return next(iter(found), "")


def remove_prefix(name: str, prefix: str) -> str | None:
    """Return a name without the prefix; None for one outside of it that is not the network's."""
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    # A classifier can stand beside its backbone.
    return name if name.partition(".")[0] in _OUTERMOST else None


def matching_models(shapes: Shapes) -> list[str]:
    """Return the models with the traits of these names and shapes, in the table's order.

    Args:
      shapes: torch name -> shape of every tensor. Only those that distinguish the models count,
        so that an incomplete state dict is still identified, and what is missing is reported.
    """
    traits = _traits_of_shapes(shapes)
    return [name for name, variant in VARIANTS.items() if _traits_of_variant(variant) == traits]


def nearest_model(shapes: Shapes) -> str | None:
    """Return the model that shares the most traits; None if the names are not a CoTNet's."""
    if not any(re.match(r"layer\d\.\d+\.conv2\.(key_embed|fc1)\.", name) for name in shapes):
        return None
    traits = _traits_of_shapes(shapes)

    def shared(name):
        own = _traits_of_variant(VARIANTS[name])
        pairs = zip(own["blocks"], traits["blocks"], strict=True)
        missing_blocks = sum(abs(blocks - there) for blocks, there in pairs)
        return sum(own[trait] == value for trait, value in traits.items()), -missing_blocks

    return max(VARIANTS, key=shared)


def _traits_of_variant(variant: Variant) -> dict:
    return {
        "blocks": tuple(variant.blocks),
        "stem_width": variant.stem_width,
        "width": variant.planes[0] * variant.base_width // 64 * variant.cardinality,
        "cardinality": variant.cardinality,
        "split_attention": variant.split_attention,
    }


def _traits_of_shapes(shapes: Shapes) -> dict:
    blocks = [0, 0, 0, 0]
    cardinality = None
    for name, shape in shapes.items():
        block = re.match(r"layer([1-4])\.(\d{1,4})\.", name)
        if block:
            stage = int(block[1]) - 1
            blocks[stage] = max(blocks[stage], int(block[2]) + 1)
        if name.endswith(".conv2.conv1x1.0.weight") and len(shape) == 4 and shape[1]:
            cardinality = shape[0] // shape[1]

    def outputs(name, missing):
        shape = shapes.get(name, ())
        return shape[0] if shape else missing

    return {
        "blocks": tuple(blocks),
        "stem_width": outputs("conv1.0.weight", 0),
        "width": outputs("layer1.0.conv1.weight", None),
        "cardinality": cardinality,
        "split_attention": "layer1.0.conv2.fc1.weight" in shapes,
    }
