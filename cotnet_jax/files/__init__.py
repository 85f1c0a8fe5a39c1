"""Paths that users type, files that are written whole, and locks on folders."""

from cotnet_jax.files.lock import (
    LEASE_SECONDS,
    FolderLock,
    LockedError,
    LockLostError,
    lock_file_beside,
)
from cotnet_jax.files.paths import expand, is_url, local
from cotnet_jax.files.whole import (
    UNFINISHED,
    append_line,
    missing_newline,
    remove_leftovers,
    sync_folder,
    write_whole,
)

__all__ = [
    "LEASE_SECONDS",
    "UNFINISHED",
    "FolderLock",
    "LockLostError",
    "LockedError",
    "append_line",
    "expand",
    "is_url",
    "local",
    "lock_file_beside",
    "missing_newline",
    "remove_leftovers",
    "sync_folder",
    "write_whole",
]
