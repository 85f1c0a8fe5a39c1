"""Files that are there whole or not at all, whatever ends the process or the machine."""

import contextlib
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Names of what is being written begin with it, files and folders alike.
UNFINISHED = ".writing-"
_TOKEN_BYTES = 4


def unfinished_name(path: str | os.PathLike) -> Path:
    """Return a new name beside ``path`` for what will be renamed to it."""
    path = Path(path)
    return path.with_name(f"{UNFINISHED}{secrets.token_hex(_TOKEN_BYTES)}-{path.name}")


@contextlib.contextmanager
def writing_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the name to write a file under, and rename it to ``path`` at the end.

    It is on the disk before it gets its name, so that not even a power cut leaves half of it. If
    the block raises, the old content is there, and nothing else is left.

    Raises:
      OSError: it could not be written.
    """
    path = Path(path)
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file by one rename: whoever reads it finds the old content or the new one.

    Raises:
      OSError: it could not be written; the old content is there, and nothing else is left.
    """
    with writing_whole(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append a line, after ending one that a kill has left without its end.

    Raises:
      OSError: it could not be written.
    """
    with open(path, "a+b") as file:
        # In one write, with what ends a torn line.
        file.write(missing_newline(file) + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one of each line; lines that a kill has torn are left out.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                parsed = json.loads(line)
                if isinstance(parsed, dict):
                    yield parsed


def missing_newline(file: BinaryIO) -> bytes:
    """Return what ends the last line of a file: a newline if a kill has left half a line, else b"".

    Args:
      file: open for reading in binary; its position is left at the end.
    """
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def sync_folder(folder: str | os.PathLike) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(
    folder: str | os.PathLike, *patterns: str, of: str | None = None
) -> list[Path]:
    """Remove what killed processes left in a folder, and return what was removed.

    Call it with the lock of the folder, or of the one entry, held, or it may be a living process's.

    Args:
      folder: looked through, but not the folders in it; it may be missing.
      *patterns: of names, as in glob, besides those of ``unfinished_name``.
      of: only what was to get this name, in a folder where others may write other files.
    """
    name = "*" if of is None else f"{'?' * 2 * _TOKEN_BYTES}-{glob.escape(of)}"
    removed = []
    for path in _matching(Path(folder), (f"{UNFINISHED}{name}", *patterns)):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
    return removed


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    yield from sorted(found)
