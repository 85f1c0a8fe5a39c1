"""Compiling: Triton kernels side by side, and lines that say that it is still under way."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from cotnet_jax.ops.compile_kernels import compile_kernels

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


def with_kernels_side_by_side(function: jax.stages.Wrapped) -> Callable[..., Any]:
    """Return a jitted function, whose first call on GPUs compiles its kernels side by side.

    Later calls with arrays of other shapes compile theirs one after the other.
    """
    compiled = False

    @functools.wraps(function)
    def call(*arguments):
        nonlocal compiled
        if not compiled and jax.default_backend() == "gpu":
            compile_kernels(function.trace(*arguments))
        compiled = True
        return function(*arguments)

    return call
