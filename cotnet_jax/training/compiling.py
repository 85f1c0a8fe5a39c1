"""Lines that say that something is still being compiled."""

import contextlib
import threading
import time
from collections.abc import Iterator

from absl import logging

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def say_while_compiling(
    what: str, seconds_between_lines: float = SECONDS_BETWEEN_LINES
) -> Iterator[None]:
    """Log that ``what`` is compiled, and every few seconds for how long, until the block ends."""
    start = time.monotonic()
    done = threading.Event()

    def say() -> None:
        while not done.wait(seconds_between_lines):
            logging.info("Still compiling %s: %.0f s.", what, time.monotonic() - start)

    logging.info("Compiling %s.", what)
    # A program that ends meanwhile does not wait for it.
    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
