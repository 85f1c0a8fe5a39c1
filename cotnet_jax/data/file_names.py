"""Names of files and folders as they are on real disks: leftovers of programs, any bytes."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from cotnet_jax.data.transforms import IMAGE_SUFFIXES

# What systems and programs leave beside a person's own files, in lower case. So is every name that
# begins with a dot: .DS_Store, ._0.jpg, .ipynb_checkpoints, .Trash-1000, .git.
_LEFTOVERS = frozenset(
    (
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "temporary items",
        "network trash folder",
    )
)
# Control characters, and separators of lines and of paragraphs.
_UNPRINTABLE = frozenset(("Cc", "Zl", "Zp"))

LEFTOVER = "that systems and programs leave behind"
DANGLING = "links that lead nowhere"
LOOP = "links to a folder that they are in"
UNREADABLE = "that cannot be read"
SPECIAL = "that are neither files nor folders"
FOLDER = "folders inside folders of classes"
OUTSIDE = "outside of folders of classes"
SUFFIX = "without an image's suffix"
_KINDS = {
    LEFTOVER: f"files and folders {LEFTOVER}",
    DANGLING: DANGLING,
    LOOP: LOOP,
    UNREADABLE: f"folders {UNREADABLE}",
    SPECIAL: f"entries {SPECIAL}",
    FOLDER: FOLDER,
    OUTSIDE: f"images {OUTSIDE}",
    SUFFIX: f"files {SUFFIX}",
}


def not_a_text(values: Iterable, what: str) -> Iterable:
    """Return values; a single text, whose letters would be taken for them, is an error.

    Raises:
      TypeError: ``values`` is a text or bytes.
    """
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{what} must be a list, such as [{values!r}], not {values!r} itself")
    return values


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is what a system or program left behind."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def as_text(name: str) -> str:
    r"""Return a name as one line of text that any UTF-8 file can hold.

    Bytes that are not UTF-8 (``os.fsdecode`` makes surrogates of them), line breaks and other
    control characters become escapes such as \xe9 and \n; all else is unchanged.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE
        else char
        for char in text
    )


def as_class_name(name: str) -> str:
    """Return the name of a class: one line of text, in the one form in which names are equal.

    macOS writes accents as characters of their own (NFD), others as parts of letters (NFC).
    """
    return unicodedata.normalize("NFC", as_text(name).strip())


def subfolders(folder: str | os.PathLike) -> list[Path]:
    """Return the folders in a folder, sorted, without leftovers of programs."""
    return sorted(
        path for path in Path(folder).iterdir() if not is_leftover(path.name) and path.is_dir()
    )


def why_no_image(path: Path) -> str:
    """Return why a path is not that of an image, one of the constants above; "" if it is one."""
    if is_leftover(path.name):
        return LEFTOVER
    if path.is_dir():
        return FOLDER
    if path.is_symlink() and not path.exists():
        return DANGLING
    if not path.is_file():
        return SPECIAL
    return "" if path.suffix.lower() in IMAGE_SUFFIXES else SUFFIX


def walk(
    folder: str | os.PathLike, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[Path, str]]:
    """Yield (path, why it is no image) of all in a folder and in those below, sorted in each.

    The reason is one of the constants above, "" for an image. Links to folders are followed.

    Args:
      above: device and inode of the folders that this one is in, to notice links in a circle; by
        default of all those up to the root.
    """
    folder = Path(folder)
    here = _identity(folder)
    above = above or tuple(map(_identity, folder.resolve().parents))
    if here in above:
        yield folder, LOOP
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        yield folder, UNREADABLE
        return
    for path in entries:
        reason = why_no_image(path)
        if reason == FOLDER:
            yield from walk(path, (*above, here))
        else:
            yield path, reason


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def left_out_lines(folder: str | os.PathLike, reasons: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a sentence for each reason for which entries of a folder were left out.

    Args:
      folder: named in each sentence.
      reasons: (path, one of the constants above) of each entry.
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons:
        by_reason.setdefault(reason, []).append(path)
    for reason in _KINDS:
        if paths := sorted(by_reason.get(reason, [])):
            first = ", ".join(map(as_text, paths[:3]))
            what = f"left out {len(paths)} {_KINDS[reason]}"
            yield f"{as_text(str(folder))}: {what}, the first {first}"
