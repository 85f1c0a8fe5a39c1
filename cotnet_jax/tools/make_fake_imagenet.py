"""Make a small fake ImageNet of coloured blocks, to try the preparation and the input pipeline.

It has the official file names, layouts and validation labels, and some odd images: those that
the real set has, too, and two damaged ones. The class is encoded by four of fourteen colours, so
that a network can learn all 1,000 classes.
"""

import argparse
import io
import itertools
import struct
import sys
import tarfile
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image
from tqdm import tqdm

from cotnet_jax import files
from cotnet_jax.data import imagenet

# The first training image of each of the first classes is odd in one of these ways.
ODD_KINDS = ("CMYK", "grey", "PNG", "thin", "tall", "EXIF", "trailing", "truncated", "empty")
UNDECODABLE_KINDS = ("truncated", "empty")
# Every second point of a 3x3x3 grid in the colour cube; there are 1,001 ways to take four.
_COLOURS = np.array(list(itertools.product((0, 128, 255), repeat=3))[::2], np.uint8)
_BLOCK = 48
_EXAMPLES = (
    "python -m cotnet_jax.tools.make_fake_imagenet --output=fake",
    "python -m cotnet_jax.tools.make_fake_imagenet --output=fake --classes=20 --validation=100",
    "python -m cotnet_jax.data.prepare imagenet --source=fake/tars --output=DATA_DIR --no_checksum",
)


class FakeImageNet(TypedDict):
    """What was made: the WordNet id by file name, and the file name by kind of odd image."""

    train: dict[str, str]
    validation: dict[str, str]
    odd: dict[str, str]


def make(
    output: Path,
    classes: int,
    train_per_class: int,
    validation: int,
    mean_size: tuple[int, int] = (375, 500),
    quality: int = 90,
) -> FakeImageNet:
    """Write the same images to output/tars and to output/folders.

    Args:
      output: folder to write to.
      classes: number of classes, the first by WordNet id, 1 to 1,000.
      train_per_class: training images per class.
      validation: validation images, or fewer if these classes have fewer. They are the first of
        the official names, with the official labels.
      mean_size: mean height and width in pixels.
      quality: of the JPEGs.

    Raises:
      FileExistsError: output/tars is already there.
    """
    tars, folders = output / "tars", output / "folders"
    tars.mkdir(parents=True)
    wnids, truth = imagenet.wnids()[:classes], imagenet.validation_wnids()
    palettes = dict(zip(wnids, itertools.combinations(_COLOURS, 4), strict=False))
    random = np.random.RandomState(0)
    canvas = _canvas(random, 3 * max(mean_size))
    made: FakeImageNet = {"train": {}, "validation": {}, "odd": {}}
    odd = list(ODD_KINDS)
    bar = tqdm(total=classes * train_per_class + validation, unit=" images", disable=None)
    with bar, tarfile.open(tars / imagenet.TRAIN_TAR, "w") as outer:
        for wnid in wnids:
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode="w") as inner:
                for number in range(train_per_class):
                    name = f"{wnid}_{random.randint(100_000)}{number}.JPEG"
                    kind = odd.pop(0) if odd and number == 0 else ""
                    data = _image(random, canvas, palettes[wnid], mean_size, quality, kind)
                    _add(inner, name, data)
                    _write(folders / "train" / wnid / name, data)
                    made["train"][name] = wnid
                    if kind:
                        made["odd"][kind] = name
                    bar.update()
            _add(outer, f"{wnid}.tar", inner_bytes.getvalue())
        with tarfile.open(tars / imagenet.VALIDATION_TAR, "w") as archive:
            numbers = [number for number, wnid in enumerate(truth, 1) if wnid in palettes]
            for number in numbers[:validation]:
                name, wnid = imagenet.validation_name(number), truth[number - 1]
                data = _image(random, canvas, palettes[wnid], mean_size, quality, "")
                _add(archive, name, data)
                _write(folders / "val" / wnid / name, data)
                made["validation"][name] = wnid
                bar.update()
    return made


def _canvas(random: np.random.RandomState, side: int) -> np.ndarray:
    """Return the texture from which all images are cut, uint8 [side, side, 3]."""
    y, x = np.mgrid[0:side, 0:side]
    waves = [128 + 100 * np.sin(x / 17) * np.cos(y / 11), (x + y) * 255 / (2 * side), x % 256]
    # With noise in 4x4 blocks the JPEGs are about as large as the real ones.
    noise = random.normal(0, 50, (side // 4 + 1, side // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(np.stack(waves, -1) + noise[:side, :side], 0, 255).astype(np.uint8)


def _image(
    random: np.random.RandomState,
    canvas: np.ndarray,
    palette: tuple[np.ndarray, ...],
    mean_size: tuple[int, int],
    quality: int,
    kind: str,
) -> bytes:
    """Return an image's file: texture under blocks in the palette's colours."""
    height, width = (int(side * random.uniform(0.6, 1.4)) for side in mean_size)
    height, width = {"thin": (10, 3000), "tall": (3000, 10)}.get(kind, (height, width))
    top, left = (random.randint(max(1, canvas.shape[0] - side)) for side in (height, width))
    window = canvas[top : top + height, left : left + width]
    texture = np.asarray(Image.fromarray(window).resize((width, height)))
    drawn = random.randint(len(palette), size=(height // _BLOCK + 1, width // _BLOCK + 1))
    colours = np.array(palette)[drawn].repeat(_BLOCK, 0).repeat(_BLOCK, 1)
    pixels = texture // 2 + colours[:height, :width] // 2
    mode = {"CMYK": "CMYK", "grey": "L"}.get(kind, "RGB")
    file = io.BytesIO()
    pil_image = Image.fromarray(pixels).convert(mode)
    pil_image.save(file, "PNG" if kind == "PNG" else "JPEG", quality=quality)
    data = file.getvalue()
    if kind == "EXIF":
        body = b"Exif\0\0MM\0*" + b"\xff" * 40
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    return {
        "trailing": data + b"junk after the end",
        "truncated": data[: len(data) // 2],
        "empty": b"",
    }.get(kind, data)


def _add(archive: tarfile.TarFile, name: str, data: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _write(path: Path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.make_fake_imagenet",
        usage="\n  ".join(["", *_EXAMPLES]),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def classes(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= imagenet.NUM_CLASSES:
            raise argparse.ArgumentTypeError(f"{text!r} is not in 1 to {imagenet.NUM_CLASSES:,}")
        return int(text)

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    parser.add_argument(
        "--output",
        type=files.local,
        required=True,
        metavar="DIR",
        help="folder to write to; the images are in DIR/tars and in DIR/folders",
    )
    parser.add_argument("--classes", type=classes, default=1000, help="default %(default)s")
    parser.add_argument("--train_per_class", type=count, default=10, help="default %(default)s")
    parser.add_argument(
        "--validation", type=count, default=2000, help="validation images, default %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        made = make(args.output, args.classes, args.train_per_class, args.validation)
    except FileExistsError as error:
        print(f"error: {error.filename} already exists; choose another --output", file=sys.stderr)
        return 1
    print(
        f"{len(made['train']):,} training and {len(made['validation']):,} validation images are in "
        f"{args.output}/tars and {args.output}/folders"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
