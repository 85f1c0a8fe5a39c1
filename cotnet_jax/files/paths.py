"""The one place where a path that a user gave becomes absolute."""

import os
import re
from pathlib import Path

# gs://bucket/folder and the like. One letter is a drive, not a scheme.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def expand(given: str | bytes | os.PathLike) -> str:
    """Return a path with ``~`` and ``~user`` replaced and made absolute; URLs are left alone.

    A shell does not replace ``~`` inside of ``--workdir=~/run``. Variables such as ``$HOME`` it
    does replace, so here a dollar sign is part of a name. Symbolic links and ``..`` stay.

    Raises:
      ValueError: the path is empty, or there is no such user.
    """
    text = os.fsdecode(given)
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError(f"{text!r}: a path cannot hold a NUL character")
    if is_url(text):
        return text
    path = Path(text)
    try:
        # Path drops the ./ of ./~, which is a folder of that name.
        return str((path.expanduser() if text.startswith("~") else path).absolute())
    except RuntimeError:
        raise ValueError(
            f"{text}: there is no user {text.split('/')[0]}; write ./{text} for a file of that name"
        ) from None


def local(path: str | os.PathLike) -> Path:
    """Return :func:`expand` of a path that must be on a mounted file system.

    Raises:
      ValueError: it is empty, a URL, or there is no such user.
    """
    text = expand(path)
    if is_url(text):
        raise ValueError(f"{text}: give a folder or file of a mounted file system, not a URL")
    return Path(text)


def is_url(path: str | os.PathLike) -> bool:
    """Return whether a path names a place outside of the file system, such as gs://bucket."""
    return bool(_URL.match(os.fsdecode(path)))
