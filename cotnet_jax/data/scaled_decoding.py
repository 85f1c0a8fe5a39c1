"""Random resized crops of JPEGs that are decoded at a fraction of their size.

A JPEG's blocks of 8 x 8 pixels can be decoded to 4 x 4, 2 x 2 or 1 pixel (Wallace, "The JPEG still
picture compression standard", 1992, and its inverse transform of fewer coefficients), at a fraction
of the time. A crop that is made smaller anyway needs no more.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cotnet_jax.data import transforms

# Sides are divided by one of these, the largest that leaves the crop as large as its target.
_FACTORS = (8, 4, 2)


def random_resized_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scaled: bool = True,
    scale: Sequence[float],
    ratio: Sequence[float],
    interpolation: str,
    max_pixels: int = transforms.MAX_PIXELS,
    exif_orientation: bool = False,
) -> Image.Image:
    """Decode an image, crop a random box (see ``transforms.crop_box``) and resize it to a square.

    The box is drawn as from the decoded image. Where it is at least twice as large as the square,
    the image is decoded at a half, a quarter or an eighth of its size; otherwise the pixels are
    those of ``transforms.random_resized_crop``, as they are where the image is no JPEG.

    Args:
      data: the whole compressed file.
      size: side of the result in pixels.
      rng: source of all randomness.
      scaled: False decodes every image in full.
      scale, ratio: as in ``transforms.crop_box``.
      interpolation: "bicubic" or "bilinear".
      max_pixels, exif_orientation: as in ``transforms.decode``.

    Returns:
      RGB image of size x size.

    Raises:
      DecodeError: as ``transforms.decode``.
    """
    header = transforms.read_jpeg_header(data, max_pixels, exif_orientation) if scaled else None
    if header is None:
        image = transforms.decode(data, max_pixels=max_pixels, exif_orientation=exif_orientation)
        return transforms.random_resized_crop(
            image, size, rng, scale=scale, ratio=ratio, interpolation=interpolation
        )
    top, left, height, width = transforms.crop_box(
        header.height, header.width, rng, scale=scale, ratio=ratio
    )
    factor = next((each for each in _FACTORS if min(height, width) >= each * size), 1)
    image, _ = transforms.decode_as_stored(
        data, max_pixels=max_pixels, exif_orientation=False, factor=factor
    )
    image = transforms.upright(image, header.orientation)
    # Pillow, where it had to decode, did it in full.
    if image.shape[:2] == (header.height, header.width):
        part = image[top : top + height, left : left + width]
        return transforms.resize(part, size, size, interpolation)
    # Sides are rounded up by the last block of what is stored, which may be the first one now.
    above = image.shape[0] - header.height / factor
    before = image.shape[1] - header.width / factor
    box = (
        top / factor + above * (header.orientation in transforms.ROWS_REVERSED),
        left / factor + before * (header.orientation in transforms.COLUMNS_REVERSED),
        height / factor,
        width / factor,
    )
    return transforms.resize_box(image, box, size, interpolation)
