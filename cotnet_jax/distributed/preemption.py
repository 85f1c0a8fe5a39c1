"""Stop a run early when SIGTERM asks for it, on all of its processes after the same step."""

import collections
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cotnet_jax.distributed.sharding import REPLICATED, SHARDED

# As os.EX_TEMPFAIL, "try again later": the same command resumes the run.
EXIT_CODE = 75
# Calls of should_stop between a process's vote and the result of the vote. The devices are as many
# steps behind, so that nobody waits for the result.
_CALLS_BEHIND = 2


class PreemptedError(Exception):
    """The run was asked to stop, and its last step is saved; the message says which."""


class PreemptionHandler:
    """Notice SIGTERM, which schedulers send before they take a machine away.

    A context manager. Until the first call of :meth:`should_stop` there is nothing to save, and
    SIGTERM ends the process at once. From then on it is only noted: the loop finishes its step,
    saves and ends. Another SIGTERM changes nothing, not even after the context.

    JAX's own service for this (``multihost_utils.reached_preemption_sync_point``) notes the
    signal from the very start, and then loses it in a run that resumes from an earlier step.

    Args:
      mesh: all devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._signalled = False
        self._listening = False
        self._earlier_handler: Any = None
        self._votes: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, REPLICATED))

    def __enter__(self) -> "PreemptionHandler":
        return self

    def __exit__(self, *_) -> None:
        if self._listening:
            handler = signal.SIG_IGN if self._signalled else self._earlier_handler
            signal.signal(signal.SIGTERM, handler)

    def should_stop(self) -> bool:
        """Return whether to stop here: the same on all processes, which call this equally often.

        With one process this is True as soon as the signal has come; with several, a few calls
        after it has come to any of them.
        """
        if not self._listening and threading.current_thread() is threading.main_thread():
            self._earlier_handler = signal.signal(signal.SIGTERM, self._on_signal)
            self._listening = True
        if jax.process_count() == 1:
            return self._signalled
        vote = np.full(len(self._mesh.local_devices), self._signalled)
        vote = jax.make_array_from_process_local_data(NamedSharding(self._mesh, SHARDED), vote)
        self._votes.append(self._any(vote))
        return len(self._votes) > _CALLS_BEHIND and bool(self._votes.popleft())

    def _on_signal(self, signal_number, frame) -> None:
        del signal_number, frame
        self._signalled = True
