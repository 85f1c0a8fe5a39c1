"""Batch normalisations folded into the convolutions before them, for inference."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze

from cotnet_jax.layers.batch_norm import BatchNorm

# A folded batch norm has this running variance: with the epsilon it makes 1.
IDENTITY_VARIANCE = np.float32(1 - BatchNorm.epsilon)

# The convolution in front of a batch norm, by their names in a module; the first that is there.
_CONVOLUTIONS = {
    "bn": ("conv3", "conv1"),
    "bn0": ("conv",),
    "bn1": ("conv1", "fc1"),
    "bn2": ("conv2",),
    "bn3": ("conv3",),
    "downsample_bn": ("downsample_conv",),
    "key_bn": ("key_conv",),
    "value_bn": ("value_conv",),
    "weight_bn": ("weight_conv1",),
    "fusion_bn": ("fusion_conv1",),
}


def fold_batch_norm(variables: Mapping[str, Any]) -> dict[str, dict]:
    """Return variables with which the model computes the same, but its batch norms only add.

    Each batch norm's multiplier goes into the convolution before it, and its shift becomes its
    bias; scale, mean and variance are then those of the identity. Of a CoT layer, ``bn`` follows
    the local aggregation, which is linear in the values: its multiplier goes into ``value_conv``.
    Arithmetic is in float64, on the host. For inference only: training would not go on from here.

    Args:
      variables: {"params", "batch_stats"} of a ``CoTNet``, or of a ``CoTLayer`` or
        ``SplitAttention``, with any arrays.

    Returns:
      {"params", "batch_stats"}, nested dicts of NumPy arrays of the same shapes and dtypes.

    Raises:
      ValueError: a batch norm has no convolution before it that is known; the message says which.
    """
    variables = unfreeze(dict(variables))
    folded = jax.tree.map(lambda leaf: np.array(leaf, np.float64), variables)
    _fold_module(folded["params"], folded["batch_stats"], "")
    return jax.tree.map(lambda leaf, original: leaf.astype(original.dtype), folded, variables)


def is_folded(norm: Mapping[str, np.ndarray]) -> bool:
    """Return whether a batch norm with these scale, mean and var is one that only adds its bias."""
    return bool(
        np.all(norm["scale"] == 1)
        and not np.any(norm["mean"])
        and np.all(norm["var"] == IDENTITY_VARIANCE)
    )


def _fold_module(params, statistics, path):
    """Fold the batch norms of a module and of those inside of it, in place."""
    for name, inside in statistics.items():
        if "var" not in inside:
            _fold_module(params[name], inside, f"{path}{name}/")
    for name, norm in statistics.items():
        # That of the aggregation takes part of another's convolution, after that one.
        if "var" in norm and not _follows_aggregation(name, params):
            _fold_into_convolution(params, name, norm, path)
    if "bn" in statistics and _follows_aggregation("bn", params):
        multiplier = _to_identity(params["bn"], statistics["bn"])
        params["value_conv"]["kernel"] *= multiplier
        params["value_bn"]["bias"] *= multiplier


def _follows_aggregation(name, params):
    return name == "bn" and "value_conv" in params


def _fold_into_convolution(params, name, norm, path):
    before = [other for other in _CONVOLUTIONS.get(name, ()) if other in params]
    if not before:
        raise ValueError(f"fold_batch_norm: no convolution is known before {path}{name}")
    multiplier = _to_identity(params[name], norm)
    convolution = params[before[0]]
    for parameter in convolution:
        # Output channels are the last axis of kernels, too.
        convolution[parameter] *= multiplier


def _to_identity(affine, statistics):
    """Make a batch norm add its shift and do nothing else, in place; return its multiplier."""
    multiplier = affine["scale"] / np.sqrt(statistics["var"] + BatchNorm.epsilon)
    affine["bias"] -= statistics["mean"] * multiplier
    affine["scale"] = np.ones_like(multiplier)
    statistics["mean"] = np.zeros_like(multiplier)
    statistics["var"] = np.full_like(multiplier, IDENTITY_VARIANCE)
    return multiplier
