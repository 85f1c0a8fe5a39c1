"""ReaL labels: every class that is in a validation image of ImageNet, as people saw them.

Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159. Their file is a JSON list with a list
of classes for each image, in the order of the images' numbers; where nobody agreed it is empty.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cotnet_jax.data import imagenet

_NUM_IMAGES = imagenet.NUM_IMAGES["validation"]


def read_real_labels(path: str | Path) -> np.ndarray:
    """The classes of every image: int32 [1 + 50,000, K], filled up with -1.

    Row n is of image number n, and row 0, of no image, has no classes. K is the largest number
    of classes in one image.

    Raises:
      ValueError: there is no such file, or it is not of that form; says what is wrong first.
    """
    try:
        lists = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    form = f"must be a list of {_NUM_IMAGES:,} lists of class numbers, as published"
    if not isinstance(lists, list) or len(lists) != _NUM_IMAGES:
        found = f"{len(lists):,} entries" if isinstance(lists, list) else type(lists).__name__
        raise ValueError(f"{path}: {form}; it has {found}")
    for index, labels in enumerate(lists):
        if not isinstance(labels, list) or not all(
            type(label) is int and 0 <= label < imagenet.NUM_CLASSES for label in labels
        ):
            raise ValueError(f"{path}: {form}; entry {index} is {str(labels)[:50]}")
    table = np.full((1 + _NUM_IMAGES, max(1, *map(len, lists))), -1, np.int32)
    for row, labels in zip(table[1:], lists, strict=True):
        row[: len(labels)] = labels
    return table


def with_real_labels(batches: Iterator[dict], table: np.ndarray) -> Iterator[dict]:
    """Gives each batch the entry "real": int32 [b, K], ``table``'s rows of its entry "number"."""
    with contextlib.closing(batches):
        for batch in batches:
            numbers = batch.pop("number")
            yield {**batch, "real": table[numbers]}
