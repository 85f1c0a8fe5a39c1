"""From compressed bytes to square uint8 images: decoding, crops, flips, the evaluation transform.

Decoded images are NumPy arrays, uint8 [H, W, 3], RGB. Between the steps of augmentation they are
Pillow images, which saves a conversion per step. All randomness comes from the generator passed
in.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# File name suffixes, in lower case, by which images are found in folders.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_JPEG_START = b"\xff\xd8"
_CROP_ATTEMPTS = 10


class DecodeError(ValueError):
    """The bytes are not a complete image of a known format."""


def decode(data: bytes) -> np.ndarray:
    """Decode an image of any format that Pillow reads.

    JPEG is decoded by simplejpeg, which gives Pillow's pixels in two thirds of the time; what it
    refuses (CMYK, a PNG named .JPEG, harmless damage) is decoded by Pillow. The EXIF orientation
    is not applied, as in the training of the published models.

    Args:
      data: the whole compressed file.

    Returns:
      uint8 [H, W, 3], RGB. Greyscale is repeated over the channels, transparency is dropped.

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
        with Image.open(io.BytesIO(data)) as pil_image:
            if pil_image.mode.startswith("I;16"):
                # Pillow would clip 16-bit grey at 255 instead of scaling it.
                grey = (np.asarray(pil_image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.array(pil_image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a known image format ({len(data)} bytes)") from error
    # Pillow's decoders raise whatever their format's parser meets (struct.error, SyntaxError, ...).
    except Exception as error:
        raise DecodeError(f"cannot decode an image of {len(data)} bytes: {error}") from error


def resize(image: np.ndarray, height: int, width: int, interpolation: str) -> Image.Image:
    """Resize with antialiasing, first horizontally, then vertically, as Pillow up to 12 does.

    Pillow rounds to uint8 between the two passes, and since version 13 it does the vertical pass
    first for some tall images. Doing the passes one by one gives the same pixels with any version.

    Args:
      image: uint8 [H, W, 3].
      height, width: size of the result in pixels.
      interpolation: "bicubic" or "bilinear".

    Returns:
      RGB image of height x width.

    Raises:
      ValueError: unknown interpolation.
    """
    if interpolation not in _FILTERS:
        raise ValueError(
            f"config.data.interpolation is {interpolation!r}; use one of {', '.join(_FILTERS)}"
        )
    resample = _FILTERS[interpolation]
    pil_image = Image.fromarray(image)
    if pil_image.width != width:
        pil_image = pil_image.resize((width, pil_image.height), resample)
    if pil_image.height != height:
        pil_image = pil_image.resize((width, height), resample)
    return pil_image


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Its share of the image's area is uniform in `scale`, its width / height log-uniform in `ratio`.
    After ten boxes that do not fit into the image, the largest central box with an allowed ratio
    is used. Source: Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842, section 6.

    Args:
      height, width: size of the image in pixels.
      rng: source of all randomness.
      scale: smallest and largest share of the image's area.
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
    """Crop a random box (see ``crop_box``) and resize it to a square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in pixels.
      rng: source of all randomness.
      scale, ratio: as in ``crop_box``.
      interpolation: "bicubic" or "bilinear".

    Returns:
      RGB image of size x size.
    """
    height, width = image.shape[:2]
    top, left, h, w = crop_box(height, width, rng, scale=scale, ratio=ratio)
    return resize(image[top : top + h, left : left + w], size, size, interpolation)


def random_flip(image: Image.Image, rng: np.random.Generator, probability: float) -> Image.Image:
    """Flip left to right with the given probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop the centre of an image and pad it with zeros where the image is smaller.

    Args:
      image: [H, W, 3] of any dtype.
      size: side of the result in pixels.

    Returns:
      [size, size, 3] of the image's dtype.
    """
    height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    out = np.zeros((size, size, 3), image.dtype)
    part = image[max(top, 0) : top + size, max(left, 0) : left + size]
    y, x = max(-top, 0), max(-left, 0)
    out[y : y + part.shape[0], x : x + part.shape[1]] = part
    return out


def eval_transform(image: np.ndarray, size: int, *, crop: float, interpolation: str) -> np.ndarray:
    """Resize the short side to floor(size / crop), then crop the central square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result in pixels.
      crop: share of the resized short side that the crop keeps.
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
