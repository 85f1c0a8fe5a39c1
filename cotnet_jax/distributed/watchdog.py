"""What a process does when another one of its run was killed, lost or hangs: it says so, and ends.

It learns of it in three ways. An exchange fails, because a connection was closed. JAX's
coordination service misses a process, and aborts this one. Or nothing happens for too long, which
a watchdog notices.
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
from typing import TypeVar

import jax
import ml_collections

# Orbax takes the coordination service's client from here, too: there is no public name for it.
from jax._src.distributed import global_state

_T = TypeVar("_T")
# "Service unavailable": the same command, started again on all, goes on.
EXIT_CODE = os.EX_UNAVAILABLE
# Failed exchanges between processes: of Gloo (CPUs), of NCCL (GPUs), of the coordination service.
_LOST = re.compile(
    r"Gloo .*(Connection (closed|reset|refused)|Read error|Write error|Broken pipe|[Tt]imed? ?out)"
    r"|NCCL .*(remote process exited|remote error|network error|communicator was aborted)"
    r"|(UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED|INTERNAL): .*"
    r"(coordination service|CoordinationService|Barrier |heartbeat|tasks are unhealthy)",
    re.DOTALL,
)
# Of an error's text the first line is told, and this much of it.
_LONGEST = 200
_CHECK_SECONDS = 0.2
# Longest time for the coordination service to answer, where it works.
_ANSWER_SECONDS = 2.0
# The service ends with the first process, and aborts the others: they get so long to end before.
_FIRST_LINGERS_SECONDS = 2.0
_ADVICE = (
    "another process was lost or hangs. If one of them ended with an error of its own, mend that. "
    "Then start the same command again on all of them."
)
_JOINING_ADVICE = (
    "not all processes came together. Start all of them with the same --coordinator_address, each "
    "with a --process_id of its own."
)
_joined = threading.Event()
# Taken by the thread that ends the process and never given back: no other thread tells more.
_ending = threading.Lock()


class Watchdog:
    """Ends the process when its main thread gets no further for too long.

    Only in a run of several processes, where a step waits for all of them. A context manager
    around all that a run does.

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
        """Yields from ``batches``; each, with the work on it, may take ``timeout_seconds``.

        The first may take ``slow_timeout_seconds``, for the compilation, and so may what follows
        the last.
        """
        self.extend()
        for batch in batches:
            yield batch
            self._allow(self._seconds)
        self.extend()

    def extend(self) -> None:
        """Says that what comes, until the next batch, may take ``slow_timeout_seconds``."""
        self._allow(self._slow_seconds)

    def left(self) -> float:
        """Seconds until the process ends, if nothing happens."""
        return self._deadline - time.monotonic()

    def _allow(self, seconds: float) -> None:
        self._allowed, self._deadline = seconds, time.monotonic() + seconds

    def _run(self) -> None:
        while not self._closed.wait(_CHECK_SECONDS):
            if self.left() < 0:
                _end(f"waited {self._allowed:g} s for the others")


def end_if_lost(_, error: BaseException | None, __) -> None:
    """Ends the process if an error is that of an exchange with a process that is gone.

    The arguments are those of a context manager's exit, for ``contextlib.ExitStack.push``.
    """
    if jax.distributed.is_initialized() and is_lost(error):
        _end(f"lost its connection ({first_line(error)})")


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed, is that of an exchange with a lost process."""
    while error is not None:
        # JAX gives some of them as a ValueError.
        if isinstance(error, RuntimeError | ValueError) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def translate_aborts() -> None:
    """Gives the aborts of JAX's coordination service the message and exit code of this module.

    The service aborts a process from a thread of its own, which Python does not learn of. Other
    aborts stay what they are.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(signal_number):
        if _service_answers():
            # Something else aborts, and raises the signal once more on return.
            libc.signal(signal_number, earlier)
        else:
            _end("was aborted by JAX's coordination service, see above")

    # The C library alone refers to it, until the end.
    translate_aborts.handler = on_abort
    earlier = libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))


def all_joined() -> None:
    """Says that all processes were there: one that is missed from now on was lost."""
    _joined.set()


def exit_together(code: int, seconds: float) -> None:
    """Ends this process as soon as the others come here too, or after so many seconds.

    Python's exit would wait for the others for minutes.
    """
    _ending.acquire()
    with contextlib.suppress(RuntimeError):
        global_state.client.wait_at_barrier("cotnet_jax exits", int(1000 * seconds))
    _exit(code, 0.2)


def first_line(error: BaseException) -> str:
    """What an error says, without what JAX's services add below."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST]


def _end(reason: str) -> None:
    _ending.acquire()
    print(
        f"error: process {global_state.process_id} of {global_state.num_processes} {reason}: "
        + (_ADVICE if _joined.is_set() else _JOINING_ADVICE),
        file=sys.stderr,
    )
    _exit(EXIT_CODE, _FIRST_LINGERS_SECONDS)


def exit_now(code: int, after_seconds: float = 0.0) -> None:
    """Ends this process as it is, without what Python and its libraries do at their exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(after_seconds)
    os._exit(code)


def _exit(code: int, first_lingers_seconds: float) -> None:
    exit_now(code, first_lingers_seconds if global_state.process_id == 0 else 0.0)


def _service_answers() -> bool:
    """Whether the coordination service works, as it does where something else aborts."""
    answered = threading.Event()

    def ask():
        try:
            global_state.client.key_value_try_get("cotnet_jax/anything")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(_ANSWER_SECONDS)
