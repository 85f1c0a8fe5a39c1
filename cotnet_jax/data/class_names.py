"""Names of classes, by their position in the logits."""

import os
import pathlib

from cotnet_jax import files

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes.

    Source: see the head of imagenet_classes.txt.
    """
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t", 1)[1] for line in lines if not line.startswith("#"))


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read class names from a text file, one per line.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8 text.
    """
    try:
        return tuple(files.local(path).read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file with one class name per line") from None
    except OSError as error:
        raise OSError(f"{path}: cannot read class names: {error.strerror}") from None
