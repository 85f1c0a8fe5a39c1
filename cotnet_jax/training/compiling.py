"""Compiling: ahead of the first call, kernels side by side, and lines that say it is under way."""

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from cotnet_jax.garbage_collector import without_garbage_collector
from cotnet_jax.ops.compile_kernels import compile_kernels, lower

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


def compile_ahead(function: jax.stages.Wrapped, *arguments: Any) -> Callable[..., Any]:
    """Start to compile a jitted function in the background.

    Args:
      function: from ``jax.jit``.
      *arguments: its arguments, or ``jax.ShapeDtypeStruct``s with their shardings.

    Returns:
      The function, for arguments of just these shapes, dtypes and shardings. A call waits for what
      is left to compile, and raises what compiling raised.
    """

    def compile_() -> jax.stages.Compiled:
        # Tracing leaves little garbage; looking for it takes a quarter of its time.
        with without_garbage_collector():
            lowered = lower(function.trace(*arguments))
        return lowered.compile()

    pool = concurrent.futures.ThreadPoolExecutor(1)
    compiled = pool.submit(compile_)
    # A program whose Python exits meanwhile waits for the thread, or JAX would crash.
    pool.shutdown(wait=False)

    @functools.wraps(function)
    def call(*arguments):
        return compiled.result()(*arguments)

    return call


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
