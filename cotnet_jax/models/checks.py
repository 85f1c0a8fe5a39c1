"""Checks at the door of a model: of what it is created with, and of the images that it is given."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cotnet_jax.layers.checks import check_array
from cotnet_jax.ops.dispatch import IMPLEMENTATIONS

# What other libraries' models take, and what to type here.
_ELSEWHERE = {
    "pretrained": "cotnet_jax.load(PATH) reads weights",
    "checkpoint_path": "cotnet_jax.load(PATH) reads weights",
    "in_chans": "it is called in_channels here",
    "drop_path": "it is called drop_path_rate here",
    "drop": "it is called drop_rate here",
}
_LAYOUT = "[N, H, W, channels]"
_TO_NHWC = "images.transpose(0, 2, 3, 1)"
_NORMALIZE = (
    "type cotnet_jax.data.normalize.normalize(images, model.default_cfg['mean'], "
    "model.default_cfg['std'], model.dtype) for pixels of 0..255"
)
# More channels than this after 1, 3 or 4 rows are columns.
_MOST_CHANNELS = 16


def _is_integer(value: Any, low: int) -> bool:
    return (
        isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= low
    )


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating)) and 0 <= float(value) < 1


def _is_floating(value: Any) -> bool:
    try:
        # NumPy takes None for float64.
        return value is not None and bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except TypeError:
        return False


def _are_stages(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(_is_integer(index, 0) and index <= 4 for index in value)
        and all(low < high for low, high in itertools.pairwise(value))
    )


_FLOATING = "a floating-point type such as jnp.bfloat16 or jnp.float32"
# Attribute -> what it must be, and whether a value is that.
_GOOD: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "num_classes": ("0 or more", lambda value: _is_integer(value, 0)),
    "out_indices": ("some of (0, 1, 2, 3, 4), in ascending order", _are_stages),
    "in_channels": ("1 or more, or None", lambda value: value is None or _is_integer(value, 1)),
    "output_stride": ("8, 16 or 32", lambda value: _is_integer(value, 0) and value in (8, 16, 32)),
    "drop_rate": ("in [0, 1)", _is_rate),
    "drop_path_rate": ("in [0, 1)", _is_rate),
    "dtype": (_FLOATING, _is_floating),
    "param_dtype": (_FLOATING, _is_floating),
    "implementation": ("'xla', 'triton' or None", lambda value: value in IMPLEMENTATIONS),
}


def check_attributes(name: str, model: type, attributes: Mapping[str, Any]) -> None:
    """Check the keyword arguments of ``create_model``.

    Args:
      name: of the variant, for the message.
      model: the class whose fields they are.
      attributes: the arguments.

    Raises:
      TypeError: some are no fields of ``model``; names the nearest.
      ValueError: lists all that have a value that cannot be used.
    """
    fields = [field.name for field in dataclasses.fields(model)]
    known = [field for field in fields if field not in ("variant", "parent", "name")]
    unknown = [_unknown(attribute, known) for attribute in attributes if attribute not in known]
    if unknown:
        raise TypeError(
            f"create_model({name!r}): {'; '.join(unknown)}; arguments are {', '.join(known)}"
        )
    problems = [
        f"{field} must be {wanted}, not {attributes[field]!r}"
        for field, (wanted, is_good) in _GOOD.items()
        if field in attributes and not is_good(attributes[field])
    ]
    out_indices = attributes.get("out_indices")
    if out_indices is not None and not attributes.get("features_only"):
        problems.append("out_indices are for features_only=True")
    if problems:
        raise ValueError(f"create_model({name!r}): {'; '.join(problems)}")


def _unknown(attribute: str, known: list[str]) -> str:
    text = f"there is no argument {attribute}"
    if attribute in _ELSEWHERE:
        return f"{text}, {_ELSEWHERE[attribute]}"
    near = difflib.get_close_matches(attribute, known, n=1)
    return f"{text}, did you mean {near[0]}?" if near else text


def check_images(images: Any, channels: int | None) -> None:
    """Check that images are [N, H, W, channels], of floats.

    Args:
      images: what the model is called with.
      channels: how many there must be; None allows any, as long as they cannot be columns.

    Raises:
      TypeError: they are no array, or not of floats.
      ValueError: their shape is another one.
    """
    check_array(images, "images", _LAYOUT, _NORMALIZE)
    shape = tuple(images.shape)
    wanted = f"images must be {_LAYOUT}"
    if 0 in shape[1:]:
        raise ValueError(f"{wanted}, none of them 0: {shape}")
    if channels is None:
        if shape[1] in (1, 3, 4) and shape[3] > _MOST_CHANNELS:
            raise ValueError(
                f"{wanted}, but {shape} looks like [N, channels, H, W]: type {_TO_NHWC}, or "
                f"in_channels={shape[3]} where the model is created if there are so many"
            )
    elif shape[3] != channels:
        raise ValueError(
            f"{wanted} with {channels} channel{'s'[: channels > 1]}, as the model's weights are "
            f"for, not {shape}: {_how_to_change_channels(shape, channels)}"
        )


def _how_to_change_channels(shape: tuple[int, ...], channels: int) -> str:
    given = shape[3]
    if shape[1] == channels:
        return f"these look like [N, channels, H, W], type {_TO_NHWC}"
    if given == 1:
        change = f"images.repeat({channels}, axis=-1)"
    elif channels == 1:
        change = "images.mean(axis=-1, keepdims=True)"
    elif given == channels + 1:
        change = f"images[..., :{channels}] to leave out the last channel, such as alpha"
    else:
        return f"adapt the weights by cotnet_jax.load(PATH, in_channels={given})"
    return f"type {change}, or adapt the weights by cotnet_jax.load(PATH, in_channels={given})"
