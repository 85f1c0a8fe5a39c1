"""Decoding images that are too large, deep, turned or damaged; the evaluation crop of long ones."""

import io
import itertools
import resource
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import EpsImagePlugin, Image, ImageOps

from cotnet_jax.data import transforms


def encode(pil_image, fmt, **options):
    file = io.BytesIO()
    pil_image.save(file, fmt, **options)
    return file.getvalue()


def grey(data, **options):
    return transforms.decode(data, **options)[..., 0]


def patched(data, old, new):
    assert data.count(old) == 1
    return data.replace(old, new)


def huge(fmt):
    """A file of under a kilobyte whose header claims 65,000 x 65,000 pixels."""
    small = Image.new("RGB", (300, 200))
    if fmt == "JPEG":
        size = struct.pack(">HH", 200, 300)
        return patched(encode(small, fmt), size, struct.pack(">HH", 65000, 65000))
    if fmt == "PNG":
        data = encode(small, fmt)
        header = b"IHDR" + struct.pack(">II", 65000, 65000) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if fmt == "BMP":
        data = encode(Image.new("1", (300, 200)), fmt)
        return patched(data, struct.pack("<ii", 300, 200), struct.pack("<ii", 65000, 65000))[:900]
    if fmt == "GIF":
        data = encode(Image.new("P", (300, 200)), fmt)
        size = struct.pack("<HH", 300, 200)
        return data.replace(size, struct.pack("<HH", 65000, 65000))
    if fmt == "PPM":
        return b"P6 65000 65000 255\n" + bytes(100)
    if fmt == "TIFF":
        data = encode(Image.new("L", (300, 200)), fmt)
        for tag in (256, 257):
            at = data.index(struct.pack("<H", tag), int.from_bytes(data[4:8], "little"))
            data = data[: at + 2] + struct.pack("<HII", 4, 1, 65000) + data[at + 12 :]
        return data
    raise AssertionError(fmt)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF"])
def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated(fmt):
    data = huge(fmt)
    transforms.decode(encode(Image.new("L", (3, 2)), "PNG"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(transforms.DecodeError, match=r"more.* than the limit of 178,956,970"):
        transforms.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3


@pytest.mark.parametrize("compression", [5, 8])
def test_a_tile_that_is_larger_than_its_image_counts(compression):
    """A file of 150 bytes, whose tile would take 900 MB."""
    tags = [
        *((256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, compression), (262, 3, 1)),
        *((277, 3, 1), (322, 4, 30_000), (323, 4, 30_000), (324, 4, 8), (325, 4, 16)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(tags)) + entries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(transforms.DecodeError, match="30000 x 30000 pixels, more than the limit"):
        transforms.decode(data + bytes(4))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3


def test_postscript_is_not_run(monkeypatch):
    def run(*_, **__):
        raise AssertionError("Ghostscript was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n"
    with pytest.raises(transforms.DecodeError, match="PostScript, which is not run"):
        transforms.decode(data)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_the_limit_counts_pixels_of_every_format(fmt):
    data = encode(Image.new("RGB", (30, 20)), fmt)
    assert transforms.decode(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(transforms.DecodeError, match="30 x 20 pixels, more than the limit of 599"):
        transforms.decode(data, max_pixels=599)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_out_of_memory_is_an_undecodable_image(fmt, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    data = encode(Image.new("RGB", (30, 20)), fmt)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(transforms.DecodeError, match="not enough memory"):
        transforms.decode(data)


def tiff(values, *, bits, sample_format, photometric=1, order="<"):
    """A TIFF file of one strip, as programs other than Pillow write them."""
    height, width = values.shape
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        text = "".join(f"{value:012b}" for value in values.ravel())
        pixels = bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    tags = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(pixels))),
        (339, 3, sample_format),
    ]
    pixels += bytes(len(pixels) % 2)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, 1)
        + (struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value))
        for tag, kind, value in tags
    )
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def row(*values, dtype):
    return np.array([values], dtype)


def pgm(maxval, values, plain=False):
    if plain:
        return f"P2 {len(values)} 1 {maxval}\n{' '.join(map(str, values))}\n".encode()
    return f"P5 {len(values)} 1 {maxval}\n".encode() + np.array(values, ">u2").tobytes()


F = np.float32
HALF = 1 << 15
DEEP = {
    "16-bit PGM": (pgm(65535, [0, 256, HALF, 65535]), [0, 1, 128, 255]),
    "12-bit PGM": (pgm(4095, [0, 16, 2048, 4095]), [0, 1, 128, 255]),
    "10-bit plain PGM": (pgm(1023, [0, 512, 1023], plain=True), [0, 128, 255]),
    "16-bit PNG": (
        encode(Image.fromarray(row(0, 255, 256, 65535, dtype=np.uint16)), "PNG"),
        [0, 0, 1, 255],
    ),
    "16-bit TIFF, big-endian": (
        tiff(row(0, 256, HALF, 65535, dtype=np.uint16), bits=16, sample_format=1, order=">"),
        [0, 1, 128, 255],
    ),
    "16-bit TIFF, white is zero": (
        tiff(row(0, 256, HALF, 65535, dtype=np.uint16), bits=16, sample_format=1, photometric=0),
        [255, 254, 127, 0],
    ),
    "16-bit TIFF, signed": (
        tiff(row(-5, 0, 1 << 14, 32767, dtype=np.int16), bits=16, sample_format=2),
        [0, 0, 128, 255],
    ),
    "12-bit TIFF": (
        tiff(row(0, 16, 2048, 4095, dtype=np.uint16), bits=12, sample_format=1),
        [0, 1, 128, 255],
    ),
    "32-bit TIFF": (
        tiff(row(0, 1 << 24, 1 << 31, 2**32 - 1, dtype=np.uint32), bits=32, sample_format=1),
        [0, 1, 128, 255],
    ),
    "32-bit TIFF, signed": (
        tiff(row(-1, 1 << 23, 1 << 30, 2**31 - 1, dtype=np.int32), bits=32, sample_format=2),
        [0, 1, 128, 255],
    ),
    "32-bit TIFF that holds 16 bits": (
        tiff(row(0, 256, HALF, 65535, dtype=np.int32), bits=32, sample_format=2, order=">"),
        [0, 1, 128, 255],
    ),
    "32-bit TIFF that holds 8 bits": (
        encode(Image.fromarray(row(0, 1, 128, 255, dtype=np.int32)), "TIFF"),
        [0, 1, 128, 255],
    ),
    "float TIFF": (
        tiff(row(-1, 0, 0.5, 1, np.nan, dtype=F), bits=32, sample_format=3),
        [0, 0, 128, 255, 0],
    ),
    "float TIFF of bytes": (
        encode(Image.fromarray(row(0, 1, 128, 255, np.inf, dtype=F)), "TIFF"),
        [0, 1, 128, 255, 255],
    ),
    "float TIFF of 16 bits": (
        tiff(row(0, 257, 65535, dtype=F), bits=32, sample_format=3, order=">"),
        [0, 1, 255],
    ),
    "PFM": (b"Pf\n3 1\n-1.0\n" + row(0, 0.5, 1, dtype="<f4").tobytes(), [0, 128, 255]),
    "1-bit PBM": (b"P4 8 1\n" + bytes([0b01010101]), [255, 0] * 4),
    "1-bit TIFF": (
        encode(Image.fromarray(row(0, 255, 255, dtype=np.uint8)).convert("1"), "TIFF"),
        [0, 255, 255],
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_depth_is_scaled_to_8_bits(name):
    data, expected = DEEP[name]
    result = transforms.decode(data)
    assert (result.dtype, result.shape) == (np.uint8, (1, len(expected), 3))
    np.testing.assert_array_equal(result[0], np.repeat(np.array(expected)[:, None], 3, 1))


def test_floats_of_unknown_range_are_undecodable():
    data = tiff(row(0, 1e9, dtype=F), bits=32, sample_format=3)
    with pytest.raises(transforms.DecodeError, match=r"reach 1e\+09; they must be in 0\.\.1"):
        transforms.decode(data)


def test_transparency_is_dropped_in_palettes_and_behind_premultiplied_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encode(image, "PNG", transparency=b"\x00\x80")
    np.testing.assert_array_equal(transforms.decode(data), [[[10, 20, 30], [40, 50, 60]]])
    image = Image.new("LA", (1, 1), (100, 128)).convert("La")
    # Half of the levels are lost in premultiplied colours.
    np.testing.assert_allclose(transforms.to_rgb(image), [[[100] * 3]], atol=1)


def oriented(orientation, fmt):
    rng = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
    return encode(Image.fromarray(pixels), fmt, exif=exif)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_on_request(fmt):
    for orientation in range(1, 9):
        data = oriented(orientation, fmt)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        result = transforms.decode(data, exif_orientation=True)
        np.testing.assert_array_equal(result, expected)
        assert result.flags.c_contiguous
        if fmt != "TIFF":
            assert transforms.decode(data).shape == (5, 7, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_change_nothing(orientation):
    data = oriented(orientation, "JPEG")
    np.testing.assert_array_equal(
        transforms.decode(data, exif_orientation=True), transforms.decode(data)
    )


def segment(code, body):
    return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body


ICC = segment(0xE2, b"ICC_PROFILE" + b"\xff\xda" * 100)
XMP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>')


@pytest.mark.parametrize("before", [b"", ICC, segment(0xFE, bytes(30_000)), b"\xff\xff", ICC * 99])
def test_orientation_is_found_behind_other_segments(before):
    exif, plain = oriented(6, "JPEG"), encode(Image.new("RGB", (7, 5)), "JPEG")
    start = exif.index(b"\xff\xe1")
    for data in (exif[:start] + before + exif[start:], plain[:2] + before + XMP + plain[2:]):
        assert transforms.decode(data, exif_orientation=True).shape == (7, 5, 3)


def with_exif(order, entries):
    """A JPEG of 7 x 5 whose EXIF has these entries: bytes of (tag, type, count, value)."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    directory = struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    data = encode(Image.new("RGB", (7, 5)), "JPEG")
    return data[:2] + segment(0xE1, b"Exif\0\0" + mark + directory) + data[2:]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_orientation_is_read_without_opening_the_image_again(order, orientation, monkeypatch):
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 7)
    turned = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    plain = encode(Image.new("RGB", (7, 5)), "JPEG")
    opened = []
    monkeypatch.setattr(Image, "open", opened.append)
    for data in (with_exif(order, [turned]), with_exif(order, [other, turned])):
        shape = (5, 7, 3) if orientation == 1 else (7, 5, 3)
        assert transforms.decode(data, exif_orientation=True).shape == shape
    for data in (plain, plain[:2] + ICC + plain[2:], with_exif(order, [other])):
        assert transforms.decode(data, exif_orientation=True).shape == (5, 7, 3)
    assert not opened


@pytest.mark.parametrize("order", "<>")
def test_an_orientation_of_another_type_is_found_too(order):
    data = with_exif(order, [struct.pack(order + "HHII", 0x0112, 4, 1, 6)])
    assert transforms.decode(data, exif_orientation=True).shape == (7, 5, 3)


def test_damaged_exif_does_no_harm_on_request():
    plain = encode(Image.new("RGB", (7, 5)), "JPEG")
    for body in (b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40):
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
        assert transforms.decode(data, exif_orientation=True).shape == (5, 7, 3)


def view(image, interpolation="bicubic"):
    return transforms.eval_transform(image, 224, crop=0.875, interpolation=interpolation)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (4000, 1), (3, 1_000_000)])
def test_the_evaluation_crop_of_a_long_image_computes_only_what_it_keeps(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert view(image).shape == (224, 224, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3


@pytest.mark.parametrize("shape", [(1, 40), (41, 2), (300, 5000), (6000, 311), (7, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_crop_of_a_long_image_is_that_of_the_whole(shape, interpolation, monkeypatch):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    result = view(image, interpolation)
    monkeypatch.setattr(transforms, "_LONG", 10**9)
    difference = np.abs(view(image, interpolation).astype(int) - result)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_ordinary_images_are_resized_as_a_whole(monkeypatch):
    monkeypatch.setattr(transforms, "_resize_centre", None)
    for height, width in itertools.product((30, 480), repeat=2):
        view(np.zeros((height, width, 3), np.uint8))
    view(np.zeros((1000, 100, 3), np.uint8))
