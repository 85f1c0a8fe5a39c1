"""Decoded images of another form than the predictor takes: one sentence with what to type."""

import numpy as np
import pytest
from PIL import Image

from cotnet_jax.data.pixels import check_pixels, check_prepared


def pixels(*shape, dtype=np.uint8, value=0):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels(4, 5, 3, dtype=np.float32, value=0.5), "(255 * pixels).round().astype('uint8')"),
        (pixels(4, 5, 3, dtype=np.float32, value=200), "type pixels.round().astype('uint8')"),
        (pixels(4, 5, 3, dtype=np.int64), "type pixels.astype('uint8') if they are 0..255"),
        (pixels(4, 5), "type pixels[..., None].repeat(3, axis=-1) for a grey one"),
        (pixels(4, 5, 1), "type pixels.repeat(3, axis=-1) for grey"),
        (pixels(4, 5, 4), "type pixels[..., :3] for RGBA"),
        (pixels(3, 4, 5), "its channels come first, type pixels.transpose(1, 2, 0)"),
        (pixels(2, 4, 5, 3), "type pixels[0] for the first of several"),
        (pixels(0), "it has no pixels, give another image"),
        (pixels(0, 5, 3), "it has no pixels, give another image"),
    ],
)
def test_one_image(image, message):
    with pytest.raises(ValueError) as raised:
        check_pixels(image)
    start = f"pixels must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}: "
    assert str(raised.value).startswith(start)
    assert message in str(raised.value)


def test_objects_of_other_kinds():
    with pytest.raises(TypeError, match=r"not PIL.Image.Image: type numpy.asarray\(image.convert"):
        check_pixels(Image.new("L", (4, 5)))
    with pytest.raises(TypeError, match=r"not builtins.list: type numpy.asarray\(image\)"):
        check_pixels([[[1, 2, 3]]])
    hint = np.asarray(Image.new("LA", (5, 4)).convert("RGB"))
    assert check_pixels(hint).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels(8, 8, 3), "type images[None] for a single image"),
        (pixels(0), "type numpy.stack([predictor.prepare(path) for path in paths])"),
        (pixels(2, 8, 8, 3).astype(str), "type numpy.stack([predictor.prepare(path)"),
        (pixels(2, 3, 8, 8), "its channels come first, type images.transpose(0, 2, 3, 1)"),
        (pixels(2, 8, 8, 1), "type images.repeat(3, axis=-1) for grey"),
        (pixels(2, 8, 8, 4), "type images[..., :3] for RGBA"),
        (pixels(2, 8, 8, 3, dtype=np.float32, value=1), "they are at most 1, type 255 * images"),
    ],
)
def test_prepared_images(images, message):
    with pytest.raises(ValueError, match=r"images must be \[N, size, size, 3\]") as raised:
        check_prepared(images)
    assert message in str(raised.value)


def test_what_is_good():
    for good in (pixels(4, 5, 3), pixels(1, 1, 3, value=255)):
        np.testing.assert_array_equal(check_pixels(good), good)
    for good in (pixels(2, 8, 8, 3), pixels(0, 8, 8, 3), pixels(2, 8, 8, 3, dtype=np.float32)):
        np.testing.assert_array_equal(check_prepared(good), good)
