"""Worker processes that outlive a signal to the whole process group, but not the main process."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any
from unittest import mock

import grain


class WorkerLostError(RuntimeError):
    """A worker process ended by itself; says what to do."""


class StartTogether(grain.IterDataset):
    """A dataset with workers (``mp_prefetch``), which start all at once.

    Grain starts a worker when it first needs it, so that each waits until the one before has
    imported everything and made its first element.
    """

    def __iter__(self) -> grain.DatasetIterator:
        iterator = iter(self._parent)
        # The state asks for the workers' own iterators, which are made then.
        iterator.get_state()
        iterator.start_prefetch()
        return iterator


def read_with_workers(dataset: grain.IterDataset) -> Iterator[Any]:
    """Yields from a dataset that ends in a ``ThreadPrefetchIterDataset``; close() ends its workers.

    Raises:
      WorkerLostError: a worker was killed.
    """
    with _sheltered_from_signals():
        iterator = iter(dataset)
        iterator.start_prefetch()
    try:
        yield from iterator
    except RuntimeError as error:
        # Grain has no type of its own for this.
        if "Worker process was terminated" not in str(error):
            raise
        raise WorkerLostError(
            "one of the processes that decode images was lost, probably killed by the system "
            "because memory ran out. Choose fewer --config.data.num_workers, then start the same "
            "command again."
        ) from None
    finally:
        iterator.close()


def end_with_main_process(worker: int, workers: int) -> None:
    """Called in a new worker, as Grain's ``worker_init_fn``.

    Grain ends its workers itself when it can; a main process that is killed cannot.
    """
    del worker, workers
    main = multiprocessing.parent_process()

    def wait_and_exit():
        main.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


@contextlib.contextmanager
def _sheltered_from_signals() -> Iterator[None]:
    """Threads and processes started inside never get SIGTERM or SIGINT, nor do their children.

    Schedulers and terminals send these to all processes of a run. The main process decides what
    follows, and needs its workers until it has.
    """
    # Started later, by the first queue, it would let the signals through again. It warns after the
    # main process has said its last word, of what an interrupted one left for it to clean up.
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore:resource_tracker"):
        resource_tracker.ensure_running()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
