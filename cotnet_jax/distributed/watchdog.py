"""End a process with one clear error when another process of its run was killed, lost or hangs.

There are three ways to notice. An exchange fails, because a connection was closed. JAX's
coordination service misses the other process's heartbeat, and aborts this one. Or nothing happens
for too long, which the watchdog notices.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import ml_collections

# Orbax takes the coordination service's client from here, too: there is no public name for it.
from jax._src.distributed import global_state

from cotnet_jax.command_line import first_line
from cotnet_jax.files import lock

_T = TypeVar("_T")
# "Service unavailable": the same command, started again on all, resumes the run.
EXIT_CODE = os.EX_UNAVAILABLE
# Failed exchanges between processes: of Gloo (CPUs), of NCCL (GPUs), of the coordination service.
_LOST_PEER = re.compile(
    r"Gloo .*(Connection (closed|reset|refused)|Read error|Write error|Broken pipe|[Tt]imed? ?out)"
    r"|NCCL .*(remote process exited|remote error|network error|communicator was aborted)"
    r"|(UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED|INTERNAL): .*"
    r"(coordination service|CoordinationService|Barrier |heartbeat|tasks are unhealthy)",
    re.DOTALL,
)
_CHECK_SECONDS = 0.2
# Longest time that a working coordination service takes to answer.
_SERVICE_TIMEOUT_SECONDS = 2.0
# The service ends with the first process and then aborts the others: this gives them time to end
# by themselves.
_FIRST_PROCESS_DELAY_SECONDS = 2.0
_LOST_PEER_ADVICE = (
    "another process was lost or hangs. If one of them ended with an error of its own, fix that. "
    "Then start the same command again on all of them."
)
_MISSING_PEER_ADVICE = (
    "not all processes have started. Start all of them with the same --coordinator_address, each "
    "with its own --process_id."
)
_initialized = threading.Event()
# Taken by the thread that ends the process and never released: no other thread prints an error.
_ending = threading.Lock()
# References to the handlers that only the C library holds otherwise, or they would be collected.
_abort_handlers: list[Any] = []


class Watchdog:
    """End the process when its main thread makes no progress for too long.

    Active only in a run of several processes, where a step waits for all of them. A context
    manager around the whole run.

    Args:
      settings: config.distributed.
    """

    def __init__(self, settings: ml_collections.ConfigDict):
        self._seconds = settings.timeout_seconds
        self._slow_seconds = settings.slow_timeout_seconds
        self._closed = threading.Event()
        self.extend()

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            threading.Thread(target=self._run, name="watchdog.Watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def guard(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Yield from ``batches``; each, with the work on it, may take ``timeout_seconds``.

        The first may take ``slow_timeout_seconds``, for the compilation, and so may what follows
        the last.
        """
        self.extend()
        for batch in batches:
            yield batch
            self.reset()
        self.extend()

    def reset(self) -> None:
        """Allow ``timeout_seconds`` from now."""
        self._allow(self._seconds)

    def extend(self) -> None:
        """Allow ``slow_timeout_seconds`` from now: for compiling, evaluating and saving."""
        self._allow(self._slow_seconds)

    def remaining(self) -> float:
        """Return the seconds until the process ends, if nothing happens."""
        return self._deadline - time.monotonic()

    def _allow(self, seconds: float) -> None:
        self._allowed, self._deadline = seconds, time.monotonic() + seconds

    def _run(self) -> None:
        while not self._closed.wait(_CHECK_SECONDS):
            if self.remaining() < 0:
                _end(f"waited {self._allowed:g} s for the others")


def exit_if_peer_lost(_, error: BaseException | None, __) -> None:
    """End the process if ``error`` comes from an exchange with a lost process.

    The arguments are those of a context manager's exit, for ``contextlib.ExitStack.push``.
    """
    if error is not None and jax.distributed.is_initialized() and is_peer_lost(error):
        _end(f"lost its connection ({first_line(error)})")


def is_peer_lost(error: BaseException | None) -> bool:
    """Return whether an error, or one behind it, comes from an exchange with a lost process."""
    while error is not None:
        # JAX raises some of them as a ValueError.
        if isinstance(error, RuntimeError | ValueError) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def handle_aborts() -> None:
    """Give the aborts of JAX's coordination service the message and exit code of this module.

    The service aborts a process from a thread of its own, without any notice to Python. Other
    aborts are left as they are.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(signal_number):
        if _service_answers():
            # Something else aborted: on return it raises the signal once more.
            libc.signal(signal_number, earlier)
        else:
            _end("was aborted by JAX's coordination service, see above")

    _abort_handlers.append(on_abort)
    earlier = libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))


def mark_initialized() -> None:
    """Note that all processes have started: one that is missing from now on was lost."""
    _initialized.set()


def exit_together(code: int, seconds: float) -> None:
    """End this process as soon as the others get here too, or after ``seconds``.

    Python's exit would wait for the others for minutes.
    """
    _ending.acquire()
    assert global_state.client is not None
    with contextlib.suppress(RuntimeError):
        global_state.client.wait_at_barrier("cotnet_jax exits", int(1000 * seconds))
    _exit(code, 0.2)


def _end(reason: str) -> None:
    _ending.acquire()
    print(
        f"error: process {global_state.process_id} of {global_state.num_processes} {reason}: "
        + (_LOST_PEER_ADVICE if _initialized.is_set() else _MISSING_PEER_ADVICE),
        file=sys.stderr,
    )
    _exit(EXIT_CODE, _FIRST_PROCESS_DELAY_SECONDS)


def exit_now(code: int, after_seconds: float = 0.0) -> None:
    """End this process without running any exit handlers of Python or its libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(after_seconds)
    lock.release_all()
    os._exit(code)


def _exit(code: int, first_process_delay: float) -> None:
    exit_now(code, first_process_delay if global_state.process_id == 0 else 0.0)


def _service_answers() -> bool:
    """Return whether the coordination service works, as it does when something else aborts."""
    answered = threading.Event()

    def ask():
        assert global_state.client is not None
        try:
            global_state.client.key_value_try_get("cotnet_jax/anything")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(_SERVICE_TIMEOUT_SECONDS)
