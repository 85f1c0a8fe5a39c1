"""Makes a small ImageNet out of coloured blocks: the official names, layouts and oddities.

Four colours out of fourteen tell a class, so that a network can learn all 1,000 of them.

`python tests/made_up_imagenet.py FOLDER` makes the full-size one, 1,000 classes and 12,000
images, as tar files in FOLDER/tars and as folders in FOLDER/folders.
"""

import io
import itertools
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

WNIDS = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
TRUTH = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
# What the real set has, too, and two things that it might have after a bad download.
ODD = ("CMYK", "grey", "PNG", "thin", "tall", "EXIF", "trailing", "truncated", "empty")
UNDECODABLE = ("truncated", "empty")
# Corners and centres of the faces of the colour cube; 1,001 ways to take four of them.
_COLOURS = np.array(list(itertools.product((0, 128, 255), repeat=3))[::2], np.uint8)
_PALETTES = dict(zip(WNIDS, itertools.combinations(_COLOURS, 4), strict=False))
_BLOCK = 48


def make(folder, classes, train_per_class, validation, mean_size=(375, 500), quality=90):
    """Writes tars/ and folders/ with the same images; the first of each ODD kind is in train.

    Args:
      folder: where to write.
      classes: number of classes, the first by WNID.
      train_per_class: training images a class.
      validation: validation images, numbered from 1, with the official labels.
      mean_size: mean height and width in pixels.
      quality: of the JPEGs.

    Returns:
      {"train": {name: wnid}, "validation": {name: wnid}, "odd": {kind: name}}.
    """
    tars, folders = folder / "tars", folder / "folders"
    tars.mkdir(parents=True)
    random = np.random.RandomState(0)
    canvas = _canvas(random, 3 * max(mean_size))
    made = {"train": {}, "validation": {}, "odd": {}}
    odd = list(ODD)
    bar = tqdm(total=classes * train_per_class + validation, unit=" images", disable=None)
    with bar, tarfile.open(tars / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS[:classes]:
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode="w") as inner:
                for number in range(train_per_class):
                    name = f"{wnid}_{random.randint(100_000)}{number}.JPEG"
                    kind = odd.pop(0) if odd and number == 0 else ""
                    data = _image(random, canvas, wnid, mean_size, quality, kind)
                    _add(inner, name, data)
                    _put(folders / "train" / wnid / name, data)
                    made["train"][name] = wnid
                    if kind:
                        made["odd"][kind] = name
                    bar.update()
            _add(outer, f"{wnid}.tar", inner_bytes.getvalue())
        with tarfile.open(tars / "ILSVRC2012_img_val.tar", "w") as archive:
            numbers = [n for n in range(1, len(TRUTH) + 1) if TRUTH[n - 1] in WNIDS[:classes]]
            for number in numbers[:validation]:
                name, wnid = f"ILSVRC2012_val_{number:08d}.JPEG", TRUTH[number - 1]
                data = _image(random, canvas, wnid, mean_size, quality, "")
                _add(archive, name, data)
                _put(folders / "val" / wnid / name, data)
                made["validation"][name] = wnid
                bar.update()
    return made


def _canvas(random, side):
    y, x = np.mgrid[0:side, 0:side]
    waves = [128 + 100 * np.sin(x / 17) * np.cos(y / 11), (x + y) * 255 / (2 * side), x % 256]
    # Noise in 4x4 blocks gives JPEGs of about the real ones' size.
    noise = random.normal(0, 50, (side // 4 + 1, side // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(np.stack(waves, -1) + noise[:side, :side], 0, 255).astype(np.uint8)


def _image(random, canvas, wnid, mean_size, quality, kind):
    height, width = (int(side * random.uniform(0.6, 1.4)) for side in mean_size)
    height, width = {"thin": (10, 3000), "tall": (3000, 10)}.get(kind, (height, width))
    top, left = (random.randint(max(1, canvas.shape[0] - side)) for side in (height, width))
    window = canvas[top : top + height, left : left + width]
    texture = np.asarray(Image.fromarray(window).resize((width, height)))
    drawn = random.randint(4, size=(height // _BLOCK + 1, width // _BLOCK + 1))
    colours = np.array(_PALETTES[wnid])[drawn].repeat(_BLOCK, 0).repeat(_BLOCK, 1)
    image = Image.fromarray(texture // 2 + colours[:height, :width] // 2)
    mode = {"CMYK": "CMYK", "grey": "L"}.get(kind, "RGB")
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG" if kind == "PNG" else "JPEG", quality=quality)
    data = file.getvalue()
    if kind == "EXIF":
        body = b"Exif\0\0MM\0*" + b"\xff" * 40
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    return {
        "trailing": data + b"junk after the end",
        "truncated": data[: len(data) // 2],
        "empty": b"",
    }.get(kind, data)


def _add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    make(Path(sys.argv[1]), classes=1000, train_per_class=10, validation=2000)
