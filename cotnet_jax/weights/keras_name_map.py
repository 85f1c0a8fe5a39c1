"""Map the names and layouts of kecam's CoTNets to variables.

kecam is keras_cv_attention_models, https://github.com/leondgarse/keras_cv_attention_models: its
modules ``cotnet``, ``aotnet`` and ``resnest`` name the layers, Keras 2 their weights. It has no
CoTNeXt, and so no layer with two channel groups.
"""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from cotnet_jax.models.cotnet import CoTNet, create_model
from cotnet_jax.models.variants import VARIANTS, Variant
from cotnet_jax.weights.name_map import TAPS, Layout, assemble, exchange

BLOCK = {
    "conv1": "deep_1_conv",
    "bn1": "deep_1_bn",
    "conv3": "deep_3_conv",
    "bn3": "3_bn",
    "downsample_conv": "shortcut_conv",
    "downsample_bn": "shortcut_bn",
    "cot/key_conv": "deep_2_cot_key_conv",
    "cot/key_bn": "deep_2_cot_key_bn",
    "cot/weight_conv1": "deep_2_cot_embed_ww_1_conv",
    "cot/weight_bn": "deep_2_cot_embed_ww_1_bn",
    "cot/weight_conv2": "deep_2_cot_embed_ww_2_conv",
    "cot/weight_norm": "deep_2_cot_embed_ww_group_norm",
    "cot/value_conv": "deep_2_cot_embed_1_conv",
    "cot/value_bn": "deep_2_cot_embed_1_bn",
    "cot/bn": "deep_2_cot_embed_2_bn",
    "cot/fusion_conv1": "deep_2_cot_attn_se_1_conv",
    "cot/fusion_bn": "deep_2_cot_attn_se_bn",
    "cot/fusion_conv2": "deep_2_cot_attn_se_2_conv",
    "split_attention/conv": "deep_2_sa_1_conv",
    "split_attention/bn0": "deep_2_sa_1_bn",
    "split_attention/fc1": "deep_2_sa_2_conv",
    "split_attention/bn1": "deep_2_sa_2_bn",
    "split_attention/fc2": "deep_2_sa_3_conv",
}
STEM_7X7 = {"stem/conv1": "stem_conv", "stem/bn": "stem_bn"}
STEM_DEEP = {
    "stem/conv1": "stem_1_conv",
    "stem/bn1": "stem_1_bn",
    "stem/conv2": "stem_2_conv",
    "stem/bn2": "stem_2_bn",
    "stem/conv3": "stem_3_conv",
    "stem/bn": "stem_bn",
}
HEAD = {"head": "predictions"}
LEAVES = {
    "kernel": "kernel",
    "scale": "gamma",
    "bias": "bias",
    "mean": "moving_mean",
    "var": "moving_variance",
}
# Batch and group normalisations call their bias so.
NORM_BIAS = "beta"
_NAME = re.compile(r"stack([1-4])_block(\d{1,4})_(.+)")

Shapes = Mapping[str, tuple[int, ...]]


def from_keras_weights(name: str, weights: Mapping[str, ArrayLike]) -> dict[str, dict]:
    """Convert kecam's weights to the variables of ``create_model(name)``.

    Args:
      name: one of ``list_models()`` with one channel group.
      weights: "LAYER/WEIGHT", such as "stem_conv/kernel" -> array, in Keras's layout and any
        floating dtype; the values are cast to float32. The numbers of classes and of input
        channels are those of the arrays.

    Returns:
      {"params", "batch_stats"}, nested dicts of float32 arrays.

    Raises:
      MisfitError: lists every missing, unexpected and misshapen array, with the nearest names.
      WeightValuesError: as ``from_torch_state_dict``.
    """
    shapes = {weight: np.shape(array) for weight, array in weights.items()}
    classifier = shapes.get("predictions/kernel", ())
    # Without the last layer kecam calls the network num_classes=0; so do we.
    classes = {"num_classes": classifier[1]} if len(classifier) == 2 and all(classifier) else {}
    if "predictions/kernel" not in shapes and "predictions/bias" not in shapes:
        classes = {"num_classes": 0}
    stem = shapes.get("stem_1_conv/kernel") or shapes.get("stem_conv/kernel") or ()
    channels = stem[2] if len(stem) == 4 and all(stem) else 3
    return assemble(create_model(name, **classes), channels, weights, _KERAS)


def keras_shapes(name: str, channels: int = 3, **attributes) -> dict[str, tuple[int, ...]]:
    """Return "LAYER/WEIGHT" -> shape of a model's weights."""
    return _KERAS.shapes(create_model(name, **attributes), channels)


def matching_models(shapes: Shapes) -> list[str]:
    """Return the models whose traits kecam's names and shapes have, in the table's order.

    Args:
      shapes: "LAYER/WEIGHT" -> shape. Only those that distinguish the models count, so that
        incomplete weights are still identified, and what is missing is reported.
    """
    traits = _traits_of_shapes(shapes)
    return [
        name
        for name, variant in VARIANTS.items()
        if variant.cardinality == 1 and _traits_of_variant(variant) == traits
    ]


def _traits_of_variant(variant: Variant) -> dict:
    width = variant.planes[0] * variant.base_width // 64
    return {
        "blocks": tuple(variant.blocks),
        "stem_width": variant.stem_width,
        "width": width,
        "split_attention": variant.split_attention,
    }


def _traits_of_shapes(shapes: Shapes) -> dict:
    blocks = [0, 0, 0, 0]
    for name in shapes:
        if block := _NAME.fullmatch(name):
            stage = int(block[1]) - 1
            blocks[stage] = max(blocks[stage], int(block[2]))

    def outputs(name, missing):
        shape = shapes.get(name, ())
        return shape[-1] if shape else missing

    return {
        "blocks": tuple(blocks),
        "stem_width": outputs("stem_1_conv/kernel", 0),
        "width": outputs("stack1_block1_deep_1_conv/kernel", None),
        "split_attention": "stack1_block1_deep_2_sa_1_conv/kernel" in shapes,
    }


def _keras_name(model: CoTNet, path: tuple[str, ...]) -> str:
    """("params", "stem", "conv1", "kernel") -> "stem_conv/kernel"."""
    _, *modules, leaf = path
    block = re.fullmatch(r"stage(\d)_block(\d+)", modules[0])
    if block:
        layer = f"stack{block[1]}_block{int(block[2]) + 1}_{BLOCK['/'.join(modules[1:])]}"
    else:
        stem = STEM_DEEP if model.variant.stem_width else STEM_7X7
        layer = (stem | HEAD)["/".join(modules)]
    is_norm = layer.endswith(("_bn", "_norm"))
    return f"{layer}/{NORM_BIAS if leaf == 'bias' and is_norm else LEAVES[leaf]}"


def _to_ours(model: CoTNet, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-2] in ("weight_conv2", "weight_norm"):
        # In Keras, as in PyTorch, the taps vary fastest, here the weight channels.
        return exchange(array, array.ndim - 1, 1, array.shape[-1] // TAPS)
    return array


def _to_keras(model: CoTNet, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-2] in ("weight_conv2", "weight_norm"):
        return exchange(array, array.ndim - 1, 1, TAPS)
    return array


_KERAS = Layout(_keras_name, _to_ours, _to_keras)
