"""From compressed bytes to square uint8 images: decoding, crops, flips, the evaluation transform.

Decoded images are NumPy arrays, uint8 [H, W, 3], RGB. Between the steps of augmentation they are
Pillow images, which saves a conversion per step. All randomness comes from the generator passed
in.
"""

import functools
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from cotnet_jax.data.depth import to_rgb
from cotnet_jax.data.exif import jpeg_orientation

# File name suffixes, in lower case, by which images are found in folders.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Pixels of the largest image that is decoded: the most that Pillow opens, 13,377 x 13,377. As RGB
# it takes 537 MB; phones take up to 200 million, of which half is the most that they store by
# default.
MAX_PIXELS = 178_956_970

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_JPEG_START = b"\xff\xd8"
# EXIF orientations whose images are turned upright by exchanging rows and columns and, then, by
# reversing their order.
_EXCHANGED = (5, 6, 7, 8)
ROWS_REVERSED, COLUMNS_REVERSED = (3, 4, 7, 8), (2, 3, 6, 7)
_CROP_ATTEMPTS = 10
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# Longer images, in multiples of the short side, are cropped before they are resized.
_LONG = 16


class DecodeError(ValueError):
    """The bytes are not a complete image of a known format."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False
) -> np.ndarray:
    """Decode an image of any format that Pillow reads, but PostScript, which is a program.

    JPEG is decoded by simplejpeg, which gives Pillow's pixels in two thirds of the time; what it
    refuses (CMYK, a PNG named .JPEG, harmless damage) is decoded by Pillow.

    Args:
      data: the whole compressed file.
      max_pixels: an image that has more, by its header, is not decoded. Pillow itself opens no
        more than ``MAX_PIXELS``.
      exif_orientation: turn the image upright as its EXIF orientation says; by default it stays as
        it is stored, as in the training of the published models.

    Returns:
      uint8 [H, W, 3], RGB. Greyscale is repeated over the channels, transparency is dropped, and
      any depth is scaled to 8 bits.

    Raises:
      DecodeError: the image is truncated, damaged, of an unknown format or too large.
    """
    image, orientation = decode_as_stored(
        data, max_pixels=max_pixels, exif_orientation=exif_orientation
    )
    return upright(image, orientation)


def decode_as_stored(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = True,
    factor: int = 1,
) -> tuple[np.ndarray, int]:
    """Decode an image as ``decode`` does, without turning it.

    Args:
      data: the whole compressed file.
      max_pixels: as in ``decode``.
      exif_orientation: look for the orientation.
      factor: 2, 4 or 8 decode a JPEG to sides of ceil(side / factor); other formats, and JPEGs that
        Pillow has to decode, keep their size.

    Returns:
      (uint8 [H, W, 3], the EXIF orientation, 1 to 8, that is left to apply). It is 1, upright,
      without one.

    Raises:
      DecodeError: as ``decode``.
    """
    try:
        image = _decode_jpeg(data, max_pixels, factor) if data[:2] == _JPEG_START else None
        if image is None:
            return _decode_by_pillow(data, max_pixels, exif_orientation)
        return image, _jpeg_orientation(data) if exif_orientation else 1
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"not a known image format ({len(data)} bytes)") from error
    # Pillow's own limit, which comes before ours where both are exceeded.
    except Image.DecompressionBombError as error:
        raise DecodeError(
            f"more pixels than the limit of {MAX_PIXELS:,}: make it smaller"
        ) from error
    except MemoryError as error:
        raise DecodeError(f"not enough memory to decode an image of {len(data)} bytes") from error
    # Pillow's decoders raise whatever their format's parser meets (struct.error, SyntaxError, ...).
    except Exception as error:
        raise DecodeError(f"cannot decode an image of {len(data)} bytes: {error}") from error


class JpegHeader(NamedTuple):
    """What a JPEG's header says.

    Attributes:
      height, width: in pixels, of the image that ``decode`` gives.
      orientation: the EXIF orientation that it applies, 1 to 8.
    """

    height: int
    width: int
    orientation: int


def read_jpeg_header(data: bytes, max_pixels: int, exif_orientation: bool) -> JpegHeader | None:
    """Return the header of a JPEG; None for other formats, and JPEGs that only Pillow decodes.

    Raises:
      DecodeError: the image is too large.
    """
    size = _jpeg_size(data, max_pixels) if data[:2] == _JPEG_START else None
    if size is None:
        return None
    orientation = _jpeg_orientation(data) if exif_orientation else 1
    height, width = size[::-1] if orientation in _EXCHANGED else size
    return JpegHeader(height, width, orientation)


def _jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Return the (height, width) as stored, or None where Pillow should try."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    # simplejpeg's CMYK is one level off Pillow's.
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _decode_jpeg(data: bytes, max_pixels: int, factor: int) -> np.ndarray | None:
    """Return the pixels, or None where Pillow should try."""
    size = _jpeg_size(data, max_pixels)
    if size is None:
        return None
    # simplejpeg takes the smallest of libjpeg-turbo's scales that is as large as this.
    least = [-(-side // factor) for side in size] if factor > 1 else [0, 0]
    try:
        return simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None


def _decode_by_pillow(
    data: bytes, max_pixels: int, exif_orientation: bool
) -> tuple[np.ndarray, int]:
    """Return the pixels and the EXIF orientation that is left to apply."""
    with Image.open(io.BytesIO(data)) as pil_image:
        if pil_image.format == "EPS":
            raise DecodeError("a program in PostScript, which is not run: save it as PNG")
        # Nothing but the header is read until here.
        _check_size(*pil_image.size, max_pixels)
        # Tiles of TIFF are decoded whole, however small the image is.
        tags = getattr(pil_image, "tag_v2", {})
        _check_size(tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0), max_pixels)
        pil_image.load()
        image = to_rgb(pil_image)
        # Read after the pixels: PNG may have it behind them, and of TIFF Pillow has applied it.
        return image, _orientation(pil_image) if exif_orientation else 1


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(
            f"{width} x {height} pixels, more than the limit of {max_pixels:,}: make it smaller"
        )


def _jpeg_orientation(data: bytes) -> int:
    found = jpeg_orientation(data)
    if found is not None:
        return found
    try:
        with Image.open(io.BytesIO(data)) as pil_image:
            return _orientation(pil_image)
    except Exception:
        return 1


def _orientation(pil_image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, upright, where there is none that can be read."""
    try:
        return pil_image.getexif().get(ExifTags.Base.Orientation, 1)
    # Damaged EXIF does no harm.
    except Exception:
        return 1


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image by its EXIF orientation (CIPA DC-008, 4.6.5.1.6); other values change nothing.

    Args:
      image: uint8 [H, W, 3].
      orientation: 2, 4: mirrored left to right, top to bottom; 3: turned by 180 degrees; 5 to 8:
        rows and columns exchanged.
    """
    if orientation in _EXCHANGED:
        image = image.swapaxes(0, 1)
    if orientation in ROWS_REVERSED:
        image = image[::-1]
    if orientation in COLUMNS_REVERSED:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


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
    resample = _filter(interpolation)
    pil_image = Image.fromarray(image)
    if pil_image.width != width:
        pil_image = pil_image.resize((width, pil_image.height), resample)
    if pil_image.height != height:
        pil_image = pil_image.resize((width, height), resample)
    return pil_image


def resize_box(
    image: np.ndarray, box: Sequence[float], size: int, interpolation: str
) -> Image.Image:
    """Resize a box whose borders lie between pixels, as ``resize`` does a whole image.

    Args:
      image: uint8 [H, W, 3].
      box: (top, left, height, width) in pixels, with fractions.
      size: side of the result in pixels.
      interpolation: "bicubic" or "bilinear".

    Returns:
      RGB image of size x size.
    """
    resample = _filter(interpolation)
    top, left, height, width = box
    y, x = math.floor(top), math.floor(left)
    part = image[y : math.ceil(top + height), x : math.ceil(left + width)]
    # Where halves were rounded up, the box may end a little behind the last pixel.
    bottom, right = min(top + height - y, part.shape[0]), min(left + width - x, part.shape[1])
    pil_image = Image.fromarray(part)
    pil_image = pil_image.resize(
        (size, pil_image.height), resample, box=(left - x, 0, right, pil_image.height)
    )
    return pil_image.resize((size, size), resample, box=(0, top - y, size, bottom))


def _filter(interpolation: str) -> Image.Resampling:
    if interpolation not in _FILTERS:
        raise ValueError(
            f"config.data.interpolation is {interpolation!r}; use one of {', '.join(_FILTERS)}"
        )
    return _FILTERS[interpolation]


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

    Of images that are longer than ``_LONG`` times their short side, only what the crop keeps is
    computed: their long side is without bound.

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
    whole = max(height, width) <= _LONG * min(height, width)
    resize_for_crop = resize if whole else functools.partial(_resize_centre, size=size)
    resized = resize_for_crop(image, new_height, new_width, interpolation)
    return central_crop(np.asarray(resized), size)


def _resize_centre(
    image: np.ndarray, height: int, width: int, interpolation: str, *, size: int
) -> Image.Image:
    """Return the central size x size pixels of a resized image, computing no others.

    They are those of ``resize`` but for Pillow's single precision of the box, which may change a
    pixel by one level.
    """
    rows, columns = _centre(image.shape[0], height, size), _centre(image.shape[1], width, size)
    resample = _filter(interpolation)
    part = Image.fromarray(image[rows.first : rows.last, columns.first : columns.last])
    part = part.resize(
        (columns.kept, part.height), resample, box=(columns.start, 0, columns.stop, part.height)
    )
    return part.resize(
        (columns.kept, rows.kept), resample, box=(0, rows.start, columns.kept, rows.stop)
    )


class _Centre(NamedTuple):
    """Where the centre of a resized side comes from.

    Attributes:
      first, last: the pixels of the original that it depends on.
      start, stop: its place in them.
      kept: its length after resizing.
    """

    first: int
    last: int
    start: float
    stop: float
    kept: int


def _centre(length: int, new_length: int, size: int) -> _Centre:
    kept = min(size, new_length)
    offset, scale = round((new_length - kept) / 2), length / new_length
    start, stop = offset * scale, (offset + kept) * scale
    # Bicubic reaches two pixels of the smaller of the two images.
    margin = 3 * max(scale, 1)
    first, last = max(0, math.floor(start - margin)), min(length, math.ceil(stop + margin))
    return _Centre(first, last, start - first, min(stop - first, last - first), kept)
