"""Names of classes, by their position in the logits, and how they are compared."""

import os
import pathlib
from collections.abc import Sequence

from cotnet_jax import files
from cotnet_jax.data.file_names import as_class_name

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")
_MAX_NAMED = 3


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes.

    Source: see the head of imagenet_classes.txt.
    """
    return tuple(name for _, name in _imagenet_rows())


def imagenet_wnids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes, by which TFDS names them."""
    return tuple(wnid for wnid, _ in _imagenet_rows())


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read class names from a text file, one per line.

    A byte-order mark and empty lines at the end are not read. Lines end at a line feed, with or
    without a carriage return, and at nothing else that Unicode calls a line break.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8 text.
    """
    try:
        text = files.local(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file with one class name per line") from None
    except OSError as error:
        raise OSError(f"{path}: cannot read class names: {error.strerror}") from None
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(lines)


def comparable(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the form in which equal ones are equal; ImageNet's become WordNet ids."""
    names = tuple(map(as_class_name, names))
    return imagenet_wnids() if names == imagenet_names() else names


def describe_difference(
    first: Sequence[str], second: Sequence[str], *, only_first: str, only_second: str
) -> str:
    """Return the names that only one of two lists has, each after its phrase; "" for none."""
    return "; ".join(
        f"{phrase} {_some(sorted(set(some) - set(others)))}"
        for phrase, some, others in ((only_first, first, second), (only_second, second, first))
        if set(some) - set(others)
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + more


def _imagenet_rows() -> list[list[str]]:
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    return [line.split("\t", 1) for line in lines if not line.startswith("#")]
