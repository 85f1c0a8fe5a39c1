"""Decoding, crops and evaluation's view, against Pillow, the goldens and the formulas."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cotnet_jax.data import transforms

GOLDENS = Path(__file__).parents[1] / "goldens"
RECIPE = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def make_image(height, width, seed):
    """The image of goldens/README.md, uint8 [height, width, 3]."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [
        128 + 100 * np.sin(x / 17) * np.cos(y / 11),
        255 * (x + y) / (height + width),
        60 + 120 * ((x // 16 + y // 16) % 2),
    ]
    noise = random.normal(0, 20, (height, width, 3))
    return np.clip(np.stack(channels, axis=-1) + noise, 0, 255).astype(np.uint8)


def encode(image, fmt="JPEG", mode=None, **options):
    image = Image.fromarray(image)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, fmt, **options)
    return file.getvalue()


def pillow(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("case", json.loads((GOLDENS / "eval_transform.json").read_text())["cases"])
def test_eval_transform_equals_golden(case):
    image = make_image(case["height"], case["width"], case["seed"])
    result = transforms.eval_transform(
        image, case["size"], crop=case["crop_pct"], interpolation="bicubic"
    )
    expected = np.load(GOLDENS / "eval_transform.npz")[case["key"]]
    np.testing.assert_array_equal(result, expected)


def test_central_crop_pads_with_zeros():
    image = np.full((3, 8, 3), 7, np.uint8)
    result = transforms.central_crop(image, 5)
    assert result.shape == (5, 5, 3)
    np.testing.assert_array_equal(result[:, 0, 0], [0, 7, 7, 7, 0])


def test_central_crop_rounds_halves_to_even():
    image = np.arange(7, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(3, 2)
    # (7 - 4) / 2 = 1.5 goes to 2, (8 - 5) / 2 = 1.5 to 2, (7 - 2) / 2 = 2.5 to 2.
    assert transforms.central_crop(image, 4)[0, 0, 0] == 2
    assert transforms.central_crop(image, 2)[0, 0, 0] == 2


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_has_pillows_pixels(subsampling, progressive):
    for size in [(1, 1), (7, 300), (123, 77)]:
        data = encode(make_image(*size, 0), subsampling=subsampling, progressive=progressive)
        np.testing.assert_array_equal(transforms.decode(data), pillow(data))


@pytest.mark.parametrize(
    ("fmt", "mode", "options"),
    [
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("PNG", None, {}),
        ("PNG", "L", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("BMP", None, {}),
        ("GIF", "P", {}),
        ("WEBP", None, {"lossless": True}),
    ],
)
def test_other_formats_become_rgb(fmt, mode, options):
    data = encode(make_image(20, 31, 1), fmt, mode, **options)
    result = transforms.decode(data)
    assert (result.dtype, result.shape) == (np.uint8, (20, 31, 3))
    np.testing.assert_array_equal(result, pillow(data))


def test_16_bit_grey_is_scaled():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    data = encode(values, "PNG")
    np.testing.assert_array_equal(transforms.decode(data)[0, :, 0], [0, 0, 1, 255])


@pytest.mark.parametrize(
    "body", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40]
)
def test_damaged_exif_does_no_harm(body):
    image = make_image(20, 31, 2)
    plain = encode(image)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    data = plain[:2] + segment + plain[2:]
    np.testing.assert_array_equal(transforms.decode(data), transforms.decode(plain))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_image(20, 31, 2), exif=exif)
    assert transforms.decode(data).shape == (20, 31, 3)


def test_bytes_after_the_end_do_no_harm():
    data = encode(make_image(20, 31, 3))
    np.testing.assert_array_equal(transforms.decode(data + b"junk"), transforms.decode(data))


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_truncated_image_is_an_error(fmt):
    data = encode(make_image(64, 64, 4), fmt)
    with pytest.raises(transforms.DecodeError, match=f"{len(data) // 2} bytes"):
        transforms.decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"no image at all"])
def test_no_image_is_an_error(data):
    with pytest.raises(transforms.DecodeError):
        transforms.decode(data)


def test_resize_passes_are_horizontal_then_vertical():
    image = make_image(1100, 300, 6)
    narrow = Image.fromarray(image).resize((256, 1100), Image.Resampling.BILINEAR)
    expected = np.array(narrow.resize((256, 938), Image.Resampling.BILINEAR))
    result = transforms.resize(image, 938, 256, "bilinear")
    np.testing.assert_array_equal(np.array(result), expected)


def test_unknown_interpolation_names_the_field():
    with pytest.raises(ValueError, match=r"config\.data\.interpolation.*bicubic, bilinear"):
        transforms.resize(make_image(4, 4, 0), 8, 8, "cubic")


def cell_probabilities(height, width, areas, ratios):
    """Share of the (area share, log ratio) draws in each cell that fit; and of those that do not.

    By midpoints of a fine grid, with windows as real numbers.
    """
    fine = 2000
    share = np.interp((np.arange(fine) + 0.5) / fine, [0, 1], RECIPE["scale"])[:, None]
    ratio = np.exp(np.interp((np.arange(fine) + 0.5) / fine, [0, 1], np.log(RECIPE["ratio"])))
    area = share * height * width
    fits = (np.sqrt(area * ratio) <= width + 0.5) & (np.sqrt(area / ratio) <= height + 0.5)
    cells, _, _ = np.histogram2d(
        np.broadcast_to(share, fits.shape)[fits],
        np.broadcast_to(np.log(ratio), fits.shape)[fits],
        bins=[areas, np.log(ratios)],
    )
    return cells / fits.size, 1 - fits.mean()


@pytest.mark.parametrize(("height", "width"), [(2000, 2000), (1500, 2600)])
def test_crop_area_and_ratio_follow_the_formula(height, width):
    rng = np.random.default_rng(1)
    boxes = [transforms.crop_box(height, width, rng, **RECIPE) for _ in range(20_000)]
    h, w = np.array(boxes, float)[:, 2:].T
    areas = np.linspace(0.08, 1, 9)
    ratios = np.geomspace(3 / 4, 4 / 3, 7)
    expected, rejected = cell_probabilities(height, width, areas, ratios)
    # The central fallback is about as likely as ten rejections: not at all for such images.
    assert rejected**10 < 1e-3
    areas[[0, -1]], ratios[[0, -1]] = (0, 2), (0, 9)
    observed, _, _ = np.histogram2d(h * w / (height * width), w / h, bins=[areas, ratios])
    enough = expected * len(boxes) > 20
    expected = expected[enough] / expected[enough].sum() * observed[enough].sum()
    assert stats.chisquare(observed[enough], expected).pvalue > 0.001
    assert observed[enough].sum() > 0.99 * len(boxes)


def test_crop_position_is_uniform():
    rng = np.random.default_rng(2)
    boxes = [
        transforms.crop_box(40, 60, rng, scale=(0.25, 0.25), ratio=(1.5, 1.5))
        for _ in range(20_000)
    ]
    top, left, h, w = np.array(boxes).T
    assert set(h) == {20}
    assert set(w) == {30}
    assert stats.chisquare(np.bincount(top, minlength=21)).pvalue > 0.001
    assert stats.chisquare(np.bincount(left, minlength=31)).pvalue > 0.001
    assert len(np.bincount(top)) == 21
    assert len(np.bincount(left)) == 31


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (3000, 10, (1493, 0, 13, 10)),
        (10, 3000, (0, 1493, 10, 13)),
        (1, 1000, (0, 499, 1, 1)),
    ],
)
def test_crop_of_extreme_images_is_the_central_fallback(height, width, box):
    assert transforms.crop_box(height, width, np.random.default_rng(0), **RECIPE) == box


def test_crop_fallback_is_the_whole_image_inside_the_ratios():
    rng = np.random.default_rng(0)
    assert transforms.crop_box(30, 31, rng, scale=(2, 2), ratio=RECIPE["ratio"]) == (0, 0, 30, 31)


def test_crop_fallback_is_as_frequent_as_ten_misfits():
    height, width = 1000, 320
    _, rejected = cell_probabilities(height, width, [0, 1], [0.5, 2])
    rng = np.random.default_rng(3)
    boxes = [transforms.crop_box(height, width, rng, **RECIPE) for _ in range(5000)]
    fallback = (286, 0, 427, 320)
    count = sum(box == fallback for box in boxes)
    assert 0.01 < rejected**10 < 0.99
    assert stats.binomtest(count, len(boxes), rejected**10).pvalue > 0.001


def test_random_resized_crop_cuts_first_then_resizes():
    image = make_image(90, 120, 5)
    top, left, h, w = transforms.crop_box(90, 120, np.random.default_rng(7), **RECIPE)
    result = transforms.random_resized_crop(
        image, 32, np.random.default_rng(7), interpolation="bicubic", **RECIPE
    )
    part = Image.fromarray(image[top : top + h, left : left + w])
    expected = part.resize((32, h), Image.Resampling.BICUBIC).resize(
        (32, 32), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(np.array(result), np.array(expected))


def test_flip_mirrors_half_of_the_images():
    image = make_image(4, 6, 0)
    rng = np.random.default_rng(0)
    given = Image.fromarray(image)
    results = [np.array(transforms.random_flip(given, rng, 0.5)) for _ in range(2000)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    kept = sum(np.array_equal(result, image) for result in results)
    assert mirrored + kept == 2000
    assert stats.binomtest(mirrored, 2000, 0.5).pvalue > 0.001
