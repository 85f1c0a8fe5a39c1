"""From compressed bytes to square uint8 images: decoding, crops, flips, evaluation's view.

Decoded images are NumPy arrays [H, W, 3], uint8, RGB; between the steps of augmentation they are
Pillow's images, which spares a conversion a step. Randomness comes from the generator passed in
and from nowhere else.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_JPEG_START = b"\xff\xd8"
_CROP_ATTEMPTS = 10


class DecodeError(ValueError):
    """The bytes are no image that can be read to its end."""


def decode(data: bytes) -> np.ndarray:
    """Decodes an image of any format that Pillow reads.

    JPEG goes through simplejpeg, which gives Pillow's pixels in two thirds of the time; what that
    refuses (CMYK, a PNG named .JPEG, harmless damage) goes through Pillow. The orientation in a
    JPEG's EXIF is not applied, as in the training of the published models.

    Args:
      data: the whole compressed file.

    Returns:
      uint8 [H, W, 3], RGB; greyscale is repeated, transparency dropped.

    Raises:
      DecodeError: the image is truncated, damaged or of an unknown format.
    """
    if data[:2] == _JPEG_START:
        try:
            # simplejpeg's CMYK is one level off Pillow's.
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):
                # Pillow would clip 16-bit grey at 255 instead of scaling it.
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DecodeError(f"{len(data)} bytes of no known image format") from error
    # Pillow's decoders raise whatever their format's parser meets (struct.error, SyntaxError, ...).
    except Exception as error:
        raise DecodeError(f"cannot decode an image of {len(data)} bytes: {error}") from error


def resize(image: np.ndarray, height: int, width: int, interpolation: str) -> Image.Image:
    """Resizes with antialiasing, as Pillow up to 12 does: first horizontally, then vertically.

    Pillow rounds to uint8 between its two passes and from version 13 takes the vertical one first
    for some tall images, so both are asked for one by one to get the same pixels everywhere.

    Args:
      image: uint8 [H, W, 3].
      height, width: of the result, in pixels.
      interpolation: "bicubic" or "bilinear".

    Returns:
      RGB image of that size.
    """
    if interpolation not in _FILTERS:
        raise ValueError(
            f"config.data.interpolation is {interpolation!r}; use one of {', '.join(_FILTERS)}"
        )
    resample = _FILTERS[interpolation]
    image = Image.fromarray(image)
    if image.width != width:
        image = image.resize((width, image.height), resample)
    if image.height != height:
        image = image.resize((width, height), resample)
    return image


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """Draws the window of a random resized crop.

    The area is uniform in `scale` of the image's, width / height log-uniform in `ratio`; after
    ten windows that do not fit, the largest central one whose ratio is allowed. Source: Szegedy
    et al., "Going Deeper with Convolutions", arXiv 1409.4842, section 6.

    Args:
      height, width: of the image, in pixels.
      rng: source of all randomness.
      scale: smallest and largest share of the area.
      ratio: smallest and largest width / height.

    Returns:
      (top, left, crop height, crop width) in pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return top, left, h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    interpolation: str,
) -> Image.Image:
    """Cuts out a random window (see crop_box) and resizes it.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in pixels.
      rng: source of all randomness.
      scale, ratio: see crop_box.
      interpolation: "bicubic" or "bilinear".

    Returns:
      RGB image, size x size.
    """
    top, left, h, w = crop_box(*image.shape[:2], rng, scale=scale, ratio=ratio)
    return resize(image[top : top + h, left : left + w], size, size, interpolation)


def random_flip(image: Image.Image, rng: np.random.Generator, probability: float) -> Image.Image:
    """Mirrors left and right with the given probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the centre [size, size, 3] out of [H, W, 3], with zeros where the image is smaller."""
    height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    out = np.zeros((size, size, 3), image.dtype)
    part = image[max(top, 0) : top + size, max(left, 0) : left + size]
    y, x = max(-top, 0), max(-left, 0)
    out[y : y + part.shape[0], x : x + part.shape[1]] = part
    return out


def eval_transform(image: np.ndarray, size: int, *, crop: float, interpolation: str) -> np.ndarray:
    """Evaluation's view: the short side resized to floor(size / crop), then the central square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in pixels.
      crop: share of the resized short side that is kept.
      interpolation: "bicubic" or "bilinear".

    Returns:
      uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    short = math.floor(size / crop)
    if height <= width:
        new_height, new_width = short, int(short * width / height)
    else:
        new_height, new_width = int(short * height / width), short
    resized = resize(image, new_height, new_width, interpolation)
    return central_crop(np.asarray(resized), size)
