"""The facts of ImageNet (ILSVRC 2012 classification), each stated once.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv 1409.0575.
What takes a long list (WordNet ids, labels, checksums) is read from the files that TFDS ships.
"""

import re
from pathlib import Path
from typing import NamedTuple

# The dataset's name and version in TFDS.
NAME = "imagenet2012"
VERSION = "5.1.0"

NUM_CLASSES = 1000
# Images of each labelled split.
NUM_IMAGES = {"train": 1_281_167, "validation": 50_000}

# Per-channel (RGB) mean and standard deviation of the pixels, on the 0..1 scale.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# The archives as published. The training archive holds one tar file per class.
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


class Checksum(NamedTuple):
    """What identifies an official archive: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


def validation_name(number: int) -> str:
    """Return the file name of a validation image: ILSVRC2012_val_00000293.JPEG for 293."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def validation_number(file_name: str) -> int:
    """Return a validation image's number, 1 to 50,000; 0 for any other file name.

    293 for ILSVRC2012_val_00000293.JPEG. Upper and lower case are not distinguished.
    """
    match = _VALIDATION_NAME.fullmatch(file_name)
    number = int(match[1]) if match else 0
    return number if number <= NUM_IMAGES["validation"] else 0


def wnids() -> list[str]:
    """Return the 1,000 WordNet ids, which name the classes' folders, in the order of labels."""
    return _words("labels.txt")


def validation_wnids() -> list[str]:
    """Return the WordNet id of every validation image; image number n is at index n - 1."""
    return _words("validation_labels.txt")


def checksums() -> dict[str, Checksum]:
    """Return the checksum of each official archive, by file name."""
    words = _words("checksums.tsv")
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    return {Path(url).name: Checksum(int(size), sha256) for url, size, sha256 in rows}


def _words(file_name: str) -> list[str]:
    # Imported here because TFDS takes seconds to import and most callers need only the constants.
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/{NAME}/{file_name}").read_text().split()
