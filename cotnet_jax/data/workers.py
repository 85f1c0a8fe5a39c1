"""Worker processes that survive signals to the process group, but not the main process's end."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any
from unittest import mock

import grain
from absl import flags


class WorkerLostError(RuntimeError):
    """A worker process was lost; the message says what to do."""


class StartTogether(grain.IterDataset):
    """A dataset with workers (``mp_prefetch``) that start all at once.

    Grain starts a worker when its first element is needed, so that each waits until the previous
    one has imported everything and made an element.
    """

    def __iter__(self) -> grain.DatasetIterator:
        iterator = iter(self._parent)
        # Reading the state creates the workers' iterators.
        iterator.get_state()
        iterator.start_prefetch()
        return iterator


def read_with_workers(dataset: grain.IterDataset) -> Generator[Any, None, None]:
    """Iterate over a dataset that ends in a ``ThreadPrefetchIterDataset``.

    Closing the generator ends the threads and workers.

    Raises:
      WorkerLostError: a worker was killed.
    """
    if not flags.FLAGS.is_parsed():
        # With workers Grain reads flags, which notebooks and scripts do not parse.
        flags.FLAGS.mark_as_parsed()
    with _signals_blocked():
        iterator = iter(dataset)
        iterator.start_prefetch()
    try:
        yield from iterator
    except RuntimeError as error:
        # Grain has no exception type for this.
        if "Worker process was terminated" not in str(error):
            raise
        raise WorkerLostError(
            "a process that decodes images was lost, probably killed because memory ran out. "
            "Run the same command again with fewer --config.data.num_workers. A script of your own "
            'must start the run under `if __name__ == "__main__":`, as each process imports the '
            "script."
        ) from None
    finally:
        iterator.close()


def exit_with_main_process(worker_index: int, worker_count: int) -> None:
    """Make a new worker exit when the main process ends; for Grain's ``worker_init_fn`` and others.

    Grain ends its workers itself, but not when the main process is killed.
    """
    del worker_index, worker_count
    main = multiprocessing.parent_process()
    assert main is not None

    def wait_and_exit():
        main.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGTERM and SIGINT in the threads and processes that are started inside.

    Schedulers and terminals send these to all processes of a run. The main process decides how to
    stop, and needs its workers until then.
    """
    # Started later, by the first queue, the resource tracker would unblock the signals. Its warning
    # of what an interrupted run left to clean up would come after the main process's last message.
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore:resource_tracker"):
        resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
