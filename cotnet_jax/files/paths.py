"""The one place where a path that a user gave becomes absolute.

Beside paths users give URLs, and repositories of the Hugging Face Hub as ``hf-hub:OWNER/NAME``.
"""

import os
import re
from pathlib import Path

# gs://bucket/folder and the like. One letter is a drive, not a scheme.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
HUB = "hf-hub:"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
# A revision is a branch, a tag or a commit, of which some have slashes.
_HUB = re.compile(rf"{HUB}({_PART}/{_PART})(?:@([A-Za-z0-9_][A-Za-z0-9_./-]*))?")


def expand(given: str | bytes | os.PathLike) -> str:
    """Return a path with ``~`` and ``~user`` replaced and made absolute.

    URLs and ``hf-hub:OWNER/NAME`` are left alone.

    A shell does not replace ``~`` inside of ``--workdir=~/run``. Variables such as ``$HOME`` it
    does replace, so here a dollar sign is part of a name. Symbolic links and ``..`` stay.

    Raises:
      ValueError: the path is empty, or there is no such user, or what follows ``hf-hub:`` is no
        name of a repository.
    """
    text = os.fsdecode(given)
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError(f"{text!r}: a path cannot hold a NUL character")
    if is_hub(text):
        parse_hub(text)
    if is_url(text) or is_hub(text):
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
      ValueError: it is empty, a URL, of the Hub, or there is no such user.
    """
    text = expand(path)
    if is_hub(text):
        raise ValueError(
            f"{text}: give a file or folder here, no repository of the Hub; ./{text} is a file "
            "of that name"
        )
    if is_url(text):
        raise ValueError(f"{text}: give a folder or file of a mounted file system, not a URL")
    return Path(text)


def cache_dir() -> Path:
    """Return the folder cotnet_jax in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return local(base) / "cotnet_jax"


def is_url(path: str | os.PathLike) -> bool:
    """Return whether a path names a place outside of the file system, such as gs://bucket."""
    return bool(_URL.match(os.fsdecode(path)))


def is_hub(path: str | os.PathLike) -> bool:
    """Return whether a path names a repository of the Hugging Face Hub, ``hf-hub:OWNER/NAME``."""
    return os.fsdecode(path).startswith(HUB)


def parse_hub(path: str | os.PathLike) -> tuple[str, str | None]:
    """Return ("OWNER/NAME", revision or None) of ``hf-hub:OWNER/NAME`` or ...``@REVISION``.

    Raises:
      ValueError: it is none of these.
    """
    text = os.fsdecode(path)
    found = _HUB.fullmatch(text)
    if not found:
        raise ValueError(
            f"{text}: no repository of the Hub; type {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION"
        )
    return found[1], found[2]
