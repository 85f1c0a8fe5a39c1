"""ReaL labels: every class that people see in a validation image of ImageNet.

Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159. The published file is a JSON list
with a list of classes for each image, in the order of the images' numbers; a list is empty where
the annotators did not agree.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cotnet_jax import files
from cotnet_jax.data import imagenet

_NUM_IMAGES = imagenet.NUM_IMAGES["validation"]


def read_real_labels(path: str | Path) -> np.ndarray:
    """Read the classes of every image: int32 [1 + 50,000, K], padded with -1.

    Row n belongs to image number n; row 0, which belongs to no image, has no classes. K is the
    largest number of classes in one image.

    Raises:
      ValueError: there is no such file, or it has another format; the message says what is wrong.
    """
    try:
        lists = json.loads(files.local(path).read_text().removeprefix("\ufeff"))
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


def real_labels_of(element: Mapping[str, Any] | None, table: np.ndarray) -> np.ndarray:
    """Return the ReaL labels of a source's element, int32 [K]: a row of ``table``.

    Args:
      element: what a source gives for an index, with its "file_name"; None for padding.
      table: from :func:`read_real_labels`.
    """
    return table[imagenet.validation_number(element["file_name"]) if element else 0]
