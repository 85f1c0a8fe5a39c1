"""Identify the model that a PyTorch state dict belongs to, by its names and shapes."""

import re
from collections.abc import Mapping

from cotnet_jax.models.variants import VARIANTS, Variant

Shapes = Mapping[str, tuple[int, ...]]


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
