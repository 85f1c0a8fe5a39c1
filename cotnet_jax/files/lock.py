"""A lock on a folder that one process at a time writes to, on local and network file systems.

The lock is a file that tells who holds it. Its holder renews it every few seconds. It is stale,
and is taken over, when its process is known to be dead, which a process of the same machine can
see at once, or when it was not renewed for the length of a lease, which works from everywhere.
Clocks are never compared, as those of two machines differ and may jump: the one that waits
watches, by its own monotonic time, whether the file changes.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

RENEW_SECONDS = 5.0
LEASE_SECONDS = 60.0
_POLL_SECONDS = 0.2
# So often may the lock's folder vanish, with the lock of another, while this one is being made.
_MOST_VANISHED = 100
# Longest time that a lock is away while a process looks whether it is the stale one.
_SETTLE_SECONDS = 0.2
_MAX_COMMAND_LENGTH = 200

# The locks that this process holds, by token.
_held: dict[str, "FolderLock"] = {}


class LockedError(OSError):
    """Another process holds the lock; the message says which, since when, and what to do."""


class LockLostError(OSError):
    """Another process has taken the lock over, because this one stood still for too long."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file tells.

    Attributes:
      token: of this very acquisition.
      host: name of the machine.
      machine: tells machines and their restarts apart, and containers, whose processes have
        numbers of their own; "" where that is unknown.
      pid: number of the process.
      started: when the process started, by the machine's own count; tells it from a later process
        of the same number. "" where that is unknown.
      since: local time of the acquisition.
      command: of the process.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"

    def is_alive(self) -> bool | None:
        """Return whether the process lives and holds the lock; None where that is not to be seen.

        Only processes of the same machine, and of the same container, see each other.
        """
        if not self.machine or self.machine != _machine():
            return None
        started = _started(self.pid)
        if self.pid == os.getpid() and self.started == started:
            return self.token in _held
        if not started and _is_hidden(self.pid):
            return None
        return self.started == started


class FolderLock:
    """Hold a folder for writing; a context manager.

    Args:
      path: the lock file. Its folder is made if missing.
      busy: what the holder does to what, to begin the error: "another run trains in DIR".
      advice: what else to do, to end the error: "choose another --workdir".
      wait: wait for the holder to release the lock, instead of raising LockedError.
      lease_seconds: a lock that was not renewed for so long is stale.

    Raises:
      LockedError: a living process holds it.
      OSError: the lock file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        busy: str,
        advice: str,
        *,
        wait: bool = False,
        lease_seconds: float = LEASE_SECONDS,
    ):
        self.path = Path(path)
        self._busy = busy
        self._advice = advice
        self._wait = wait
        self._lease_seconds = lease_seconds
        self._token = ""
        self._pid = 0
        self._made_folders: list[Path] = []
        self._vanished = 0
        self._lost_to: str | None = None
        self._released = threading.Event()

    def __enter__(self) -> "FolderLock":
        if not self._token:
            self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, waiting for a lease to run out where that is the only way to know."""
        self._made_folders = [f for f in self.path.parents if not f.exists()]
        watch = _Watch(self.path, time.monotonic)
        announced = False
        while not self._try_to_create():
            state = watch.look()
            if state is None:
                continue
            holder, unchanged = state
            alive = holder.is_alive() if holder else None
            if alive is False or (alive is None and unchanged > self._lease_seconds):
                self._remove_stale(watch)
                continue
            if not self._wait and (alive or watch.changes):
                raise LockedError(
                    f"{self._busy}: {holder or 'its process is unknown'}. Wait for its end or stop "
                    f"it, or {self._advice}. (The lock is {self.path}.)"
                )
            if not announced:
                announced = True
                logging.warning(
                    "%s: %s. Waiting %s.",
                    self._busy,
                    holder or "its process is unknown",
                    "for its end"
                    if self._wait
                    else f"up to {self._lease_seconds:g} s for a sign of life",
                )
            time.sleep(min(_POLL_SECONDS, self._lease_seconds / 10))

    def release(self) -> None:
        """Give the lock back, and remove its folder again if it made it and nothing is in it.

        Do nothing where the lock is not held, or was lost.
        """
        if not self._token or self._pid != os.getpid():
            return
        token, self._token = self._token, ""
        self._released.set()
        _held.pop(token, None)
        with contextlib.suppress(OSError):
            if _token_of(_read(self.path)) == token:
                self.path.unlink()
                for folder in self._made_folders:
                    folder.rmdir()

    def check(self) -> None:
        """Check that the lock was not taken over; costs nothing.

        Raises:
          LockLostError: it was.
        """
        if self._lost_to is not None:
            raise LockLostError(
                f"this process stood still for more than {self._lease_seconds:g} s, and lost "
                f"{self.path} to {self._lost_to}. It ends here, before the two harm each other."
            )

    def _try_to_create(self) -> bool:
        """Create the lock file with its content, if there is none."""
        token = secrets.token_hex(8)
        content = json.dumps(dataclasses.asdict(_describe_this_process(token))).encode()
        # With its content in it before it gets its name. Some file systems have no hard links:
        # there a reader may find it empty for a moment, and waits.
        draft = self.path.with_name(f".writing-{token}-{self.path.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                _create(draft, content)
                os.link(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)
        except FileExistsError:
            # A network file system may have done it, and repeated it as its answer was lost.
            if _token_of(_read(self.path)) != token:
                return False
        except OSError:
            try:
                _create(self.path, content)
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Without its folder, the holder has just released it. Some folders, such as /proc,
                # answer so for ever.
                self._vanished += 1
                if self._vanished > _MOST_VANISHED:
                    raise
                return False
        self._token, self._pid = token, os.getpid()
        self._lost_to, self._released = None, threading.Event()
        _held[token] = self
        threading.Thread(
            target=self._renew, args=(token, self._released), name="FolderLock", daemon=True
        ).start()
        return True

    def _remove_stale(self, watch: "_Watch") -> None:
        """Remove the lock file that was found stale, but never another one that replaced it."""
        stale = self.path.with_name(f".writing-{secrets.token_hex(8)}-stale-{self.path.name}")
        if _read(self.path) != watch.content:
            return
        # One of several processes that try succeeds.
        with _suppress_gone():
            os.rename(self.path, stale)
            if _read(stale) != watch.content:
                # Between the look and the rename another process has taken it over: give it back.
                with contextlib.suppress(OSError):
                    os.link(stale, self.path)
            else:
                logging.warning(
                    "Took over the lock %s of %s, which has ended.",
                    self.path,
                    _holder(watch.content) or "an unknown process",
                )
            stale.unlink()

    def _renew(self, token: str, released: threading.Event) -> None:
        while not released.wait(min(RENEW_SECONDS, self._lease_seconds / 5)):
            try:
                content = _read(self.path)
                if content is None:
                    # For a moment, while it is given back by one that took it for stale.
                    time.sleep(_SETTLE_SECONDS)
                    content = _read(self.path)
                if _token_of(content) != token and not released.is_set():
                    self._lost_to = str(_holder(content) or "another process, or by hand")
                    _held.pop(token, None)
                    return
                # Takes no space, so it works on a full disk.
                os.utime(self.path)
            except OSError:
                # A network file system may come back: whether the lock is lost is read then.
                continue


def lock_file_beside(path: str | os.PathLike) -> Path:
    """Return the lock file of a file or folder that is being made, which lies beside it."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock")


def release_all() -> None:
    """Release all locks of this process, before it ends without running its exit handlers."""
    for lock in list(_held.values()):
        lock.release()


class _Watch:
    """Watches a lock file for changes.

    Attributes:
      content: the last seen.
      changes: how often it, or its time, was seen to change.
    """

    def __init__(self, path: Path, clock: Callable[[], float]):
        self._path = path
        self._clock = clock
        self._seen: Any = None
        self._since = 0.0
        self.content: bytes | None = None
        self.changes = 0

    def look(self) -> tuple[Holder | None, float] | None:
        """Return the holder and the seconds without a change; None where there is no lock."""
        try:
            # Opening it makes a network file system ask its server.
            with self._path.open("rb") as file:
                self.content = file.read()
                seen = (self.content, os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError:
            # Of a file that another host has just replaced.
            seen = None
        now = self._clock()
        if seen != self._seen:
            self.changes += self._seen is not None
            self._seen, self._since = seen, now
        return _holder(self.content), now - self._since


@contextlib.contextmanager
def _suppress_gone() -> Iterator[None]:
    """Suppress the errors of a file that another process, or another host, has removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def _create(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holder(content: bytes | None) -> Holder | None:
    try:
        return Holder(**json.loads(content or b""))
    except (ValueError, TypeError):
        return None


def _token_of(content: bytes | None) -> str | None:
    holder = _holder(content)
    return holder.token if holder else None


def _describe_this_process(token: str) -> Holder:
    return Holder(
        token=token,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        command=shlex.join(sys.argv)[:_MAX_COMMAND_LENGTH],
    )


def _machine() -> str:
    """Return what processes share that see each other's numbers; "" where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name, as virtual machines that are copies of one another have the rest in common.
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:
        return ""


def _is_hidden(pid: int) -> bool:
    """Return whether there is such a process, of another user, that /proc may not show."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _started(pid: int) -> str:
    """Return when a process of this machine started; "" where there is none, or it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return ""
    # The second field, the name in parentheses, may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    # One that has ended, but that its parent has not asked about, is still listed.
    return "" if state in "ZX" else fields[18]
