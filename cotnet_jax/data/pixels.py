"""Checks of decoded images in memory, with what to type for those of another form."""

from typing import Any

import numpy as np


def check_pixels(image: Any) -> np.ndarray:
    """Return one decoded image as an array, if it is uint8 [H, W, 3].

    Raises:
      TypeError: it is no array.
      ValueError: it has another dtype or shape.
    """
    if not hasattr(image, "dtype"):
        # Pillow's modes are RGB, RGBA, L, P, ...
        pixels = "image.convert('RGB')" if hasattr(image, "convert") else "image"
        raise TypeError(
            "image must be a path, the bytes of a file, or pixels, uint8 [H, W, 3], not "
            f"{type(image).__module__}.{type(image).__name__}: type numpy.asarray({pixels})"
        )
    pixels = np.asarray(image)
    hint = _hint_for_one(pixels)
    if hint:
        raise ValueError(
            f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}: {hint}"
        )
    return pixels


def check_prepared(images: Any) -> np.ndarray:
    """Return prepared images as an array, if they are [N, size, size, 3] of values 0..255.

    Raises:
      ValueError: they have another shape, or values that are not finite or on another scale.
    """
    pixels = np.asarray(images)
    hint = _hint_for_several(pixels)
    if hint:
        raise ValueError(
            "images must be [N, size, size, 3] of values 0..255, as prepare() makes them, not "
            f"{pixels.dtype} {list(pixels.shape)}: {hint}"
        )
    # XLA's code for CPUs can lose a NaN on its way through a network.
    wrong = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
    if wrong.size:
        raise ValueError(f"images {wrong.tolist()} have values that are not finite")
    return pixels


def _hint_for_one(pixels: np.ndarray) -> str:
    shape = pixels.shape
    if pixels.size == 0:
        return "it has no pixels, give another image"
    if pixels.ndim == 2:
        return "type pixels[..., None].repeat(3, axis=-1) for a grey one"
    if pixels.ndim == 4:
        return "type pixels[0] for the first of several, they are prepared one by one"
    if pixels.ndim != 3:
        return "give the rows, columns and channels of an image"
    if shape[2] != 3:
        return _hint_for_channels("pixels", shape, "transpose(1, 2, 0)")
    if np.issubdtype(pixels.dtype, np.floating):
        scaled = "(255 * pixels)" if np.nanmax(pixels) <= 1 else "pixels"
        return f"type {scaled}.round().astype('uint8')"
    return "" if pixels.dtype == np.uint8 else "type pixels.astype('uint8') if they are 0..255"


def _hint_for_several(images: np.ndarray) -> str:
    shape = images.shape
    if images.ndim == 3 and images.size:
        return "type images[None] for a single image"
    if images.ndim != 4 or 0 in shape[1:]:
        return "type numpy.stack([predictor.prepare(path) for path in paths])"
    if shape[3] != 3:
        return _hint_for_channels("images", shape, "transpose(0, 2, 3, 1)")
    if not (np.issubdtype(images.dtype, np.number) or images.dtype == bool):
        return "type numpy.stack([predictor.prepare(path) for path in paths])"
    if np.issubdtype(images.dtype, np.floating) and images.size and 0 < images.max() <= 1:
        return "they are at most 1, type 255 * images"
    return ""


def _hint_for_channels(name: str, shape: tuple[int, ...], transpose: str) -> str:
    channels = shape[-1]
    if shape[-3] == 3:
        return f"its channels come first, type {name}.{transpose}"
    if channels == 1:
        return f"type {name}.repeat(3, axis=-1) for grey"
    if channels == 4:
        return f"type {name}[..., :3] for RGBA"
    return f"choose three channels, such as {name}[..., :3]" if channels > 3 else "give RGB"
