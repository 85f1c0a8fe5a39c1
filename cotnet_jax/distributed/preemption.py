"""Stopping a run early, on all of its processes after the same step, when SIGTERM asks for it."""

import collections
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cotnet_jax.distributed.sharding import REPLICATED, SPLIT

# As os.EX_TEMPFAIL, "try again later": the same command goes on.
EXIT_CODE = 75
# Calls between a process's question and the answer of all. The devices are as many steps behind,
# so that nobody waits for an answer.
_CALLS_BEHIND = 2


class PreemptedError(Exception):
    """The run was asked to stop, and its last step is saved; the message says which."""


class PreemptionHandler:
    """Learns of SIGTERM, which schedulers send before they take a machine away.

    A context manager. Until the first call of :meth:`should_stop` there is nothing to save, and
    SIGTERM ends the process at once. From then on it is only noted: the loop finishes its step,
    saves and leaves. Another SIGTERM changes nothing, not even after the context.

    JAX's own service for this (``multihost_utils.reached_preemption_sync_point``) notes the
    signal from the very start, and then forgets it in a run that goes on from an earlier step.

    Args:
      mesh: all devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._asked = False
        self._listening = False
        self._earlier_handler = None
        self._answers: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, REPLICATED))

    def __enter__(self) -> "PreemptionHandler":
        return self

    def __exit__(self, *_) -> None:
        if self._listening:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._asked else self._earlier_handler)

    def should_stop(self) -> bool:
        """Whether to stop here: the same on all processes, which call this equally often.

        With one process true as soon as the signal has come; with several a few calls after it
        has come to any of them.
        """
        if not self._listening and threading.current_thread() is threading.main_thread():
            self._earlier_handler = signal.signal(signal.SIGTERM, self._note)
            self._listening = True
        if jax.process_count() == 1:
            return self._asked
        asked = np.full(len(self._mesh.local_devices), self._asked)
        asked = jax.make_array_from_process_local_data(NamedSharding(self._mesh, SPLIT), asked)
        self._answers.append(self._any(asked))
        return len(self._answers) > _CALLS_BEHIND and bool(self._answers.popleft())

    def _note(self, signal_number, frame) -> None:
        del signal_number, frame
        self._asked = True
