"""Checksums of files."""

import hashlib
import io
import os
from collections.abc import Callable


def sha256(
    *paths: str | os.PathLike, after_read: Callable[[int], object] = lambda count: None
) -> str:
    """Return the SHA-256 of a file, in hexadecimal; of several, that of all one after the other.

    Args:
      *paths: the files.
      after_read: called with the number of bytes after each part that was read, for progress.

    Raises:
      OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with _Reported(path, after_read) as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


class _Reported(io.FileIO):
    """A file that reports how much of it was read."""

    def __init__(self, path: str | os.PathLike, after_read: Callable[[int], object]):
        super().__init__(path)
        self._after_read = after_read

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._after_read(count)
        return count
