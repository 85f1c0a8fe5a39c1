"""Names of classes, by their position in the logits."""

import os
import pathlib

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")
IMAGENET_CLASSES = 1000


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet; the file beside this one states its source."""
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t", 1)[1] for line in lines if not line.startswith("#"))


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """A text file with a name on each line.

    Raises:
      OSError: it cannot be read; ValueError: it is not text.
    """
    try:
        return tuple(pathlib.Path(path).read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file with the name of a class on each line") from None
    except OSError as error:
        raise OSError(f"{path}: no names of classes: {error.strerror}") from None
