"""A manifest of a folder's files with sizes and CRC-32, by which damage is noticed.

Orbax's format has checksums for its index but not for the array data: without the manifest a
flipped bit would be restored silently.
"""

import concurrent.futures
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cotnet_jax.files import write_whole

NAME = "manifest.json"
# Orbax changes these two after the manifest is made; restoring the arrays needs neither.
_UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamageError(Exception):
    """A folder differs from its manifest; the message says how."""


def checksums(folder: epath.Path) -> dict[str, list[int]]:
    """Return {path relative to ``folder``: [size in bytes, CRC-32]} of the files to check."""
    files = [
        path
        for path in _files(folder)
        if path.relative_to(folder).as_posix() not in (*_UNCHECKED, NAME)
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(_size_and_crc32, files)
        return {
            path.relative_to(folder).as_posix(): size_and_crc
            for path, size_and_crc in zip(files, sums, strict=True)
        }


def write(folder: epath.Path, files: Mapping[str, list[int]], extra: Mapping[str, Any]) -> None:
    """Write the manifest of ``folder``: the result of :func:`checksums`, and ``extra`` JSON."""
    content = json.dumps({**extra, "files": files}, sort_keys=True)
    document = json.dumps({"crc32": zlib.crc32(content.encode()), "content": content})
    write_whole(folder / NAME, document)


def read(folder: epath.Path) -> dict[str, Any]:
    """Return the manifest: "files" and the extra entries.

    Raises:
      DamageError: the manifest is missing or damaged.
    """
    try:
        document = json.loads((folder / NAME).read_text())
        content = document["content"]
        if document["crc32"] == zlib.crc32(content.encode()):
            return json.loads(content)
    except FileNotFoundError:
        raise DamageError(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{NAME} cannot be read: {error}") from None
    raise DamageError(f"{NAME} does not match its own checksum")


def check(folder: epath.Path) -> None:
    """Compare every file of ``folder`` with the manifest.

    Raises:
      DamageError: names the first file that differs.
    """
    expected = read(folder)["files"]
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise DamageError(f"{missing[0]} is missing")
    try:
        found = checksums(folder)
    except OSError as error:
        raise DamageError(str(error)) from None
    for name, (size, crc) in expected.items():
        if found[name][0] != size:
            raise DamageError(f"{name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != crc:
            raise DamageError(f"{name} has changed since it was written (CRC-32 differs)")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _size_and_crc32(path: epath.Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]
