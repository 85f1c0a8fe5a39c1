"""Paths that users type, files that are written whole, checksums, and locks on folders."""

from cotnet_jax.files.digest import sha256
from cotnet_jax.files.lock import (
    LEASE_SECONDS,
    FolderLock,
    LockedError,
    LockLostError,
    lock_file_beside,
)
from cotnet_jax.files.paths import HUB, cache_dir, expand, is_hub, is_url, local, parse_hub
from cotnet_jax.files.whole import (
    UNFINISHED,
    append_line,
    missing_newline,
    read_json_lines,
    remove_leftovers,
    sync_folder,
    unfinished_name,
    write_whole,
    writing_whole,
)

__all__ = [
    "HUB",
    "LEASE_SECONDS",
    "UNFINISHED",
    "FolderLock",
    "LockLostError",
    "LockedError",
    "append_line",
    "cache_dir",
    "expand",
    "is_hub",
    "is_url",
    "local",
    "lock_file_beside",
    "missing_newline",
    "parse_hub",
    "read_json_lines",
    "remove_leftovers",
    "sha256",
    "sync_folder",
    "unfinished_name",
    "write_whole",
    "writing_whole",
]
