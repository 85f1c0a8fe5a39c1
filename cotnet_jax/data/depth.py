"""Images of any depth and kind of pixels, as RGB of 8 bits."""

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
# Pillow opens no other modes of more than 8 bits.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# Pillow converts these only to what they are without the premultiplied alpha.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# The ranges that floating-point images are usual in.
_FLOAT_RANGES = (1.0, 255.0, 65535.0)


def to_rgb(pil_image: Image.Image) -> np.ndarray:
    """Return the pixels of a loaded image, uint8 [H, W, 3].

    Greyscale is repeated over the channels and transparency is dropped. Integers of up to 16 bits
    are divided by their full range. What has 32 bits rarely fills them: integers are taken to have
    8, 16 or all bits and floating-point numbers to be in 0..1, 0..255 or 0..65535, the first of
    these that holds the largest value. Negative numbers and NaN are black.

    Raises:
      ValueError: the mode is unknown, or floating-point numbers are beyond 65535.
    """
    if pil_image.mode in _DEEP_MODES:
        return np.repeat(_deep_grey(pil_image)[..., None], 3, axis=-1)
    if pil_image.mode in _PREMULTIPLIED:
        pil_image = pil_image.convert(_PREMULTIPLIED[pil_image.mode])
    return np.array(pil_image.convert("RGB"))


def _deep_grey(pil_image: Image.Image) -> np.ndarray:
    """Return a greyscale image of more than 8 bits, uint8 [H, W]."""
    # Only TIFF has tags, and many depths for one mode.
    tags = getattr(pil_image, "tag_v2", {})
    values = np.asarray(pil_image)
    if pil_image.mode == "F":
        grey = _scale_floats(values)
    else:
        bits = tags.get(_BITS_PER_SAMPLE, (0,))[0]
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        if pil_image.mode != "I":
            bits = bits or 16
        elif pil_image.format in ("PPM", "PNG"):
            # 16 bits in Pillow's 32.
            bits = 16
        elif bits == 32 and not signed:
            values = values.view(np.uint32)
        grey = _scale_integers(values, (bits or 32) - signed)
    # Pillow inverts such images only if they have 8 bits or fewer.
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _scale_integers(values: np.ndarray, bits: int) -> np.ndarray:
    if bits > 16:
        bits = next(few for few in (8, 16, bits) if values.max(initial=0) < 1 << few)
    return (values.clip(0) >> (bits - 8)).astype(np.uint8)


def _scale_floats(values: np.ndarray) -> np.ndarray:
    largest = values.max(initial=0, where=np.isfinite(values))
    for full in _FLOAT_RANGES:
        if largest <= full:
            values = np.nan_to_num(values, nan=0, posinf=full, neginf=0).clip(0, full)
            return np.rint(values * (255 / full)).astype(np.uint8)
    raise ValueError(
        f"its floating-point values reach {largest:g}; they must be in 0..1, 0..255 or 0..65535"
    )
