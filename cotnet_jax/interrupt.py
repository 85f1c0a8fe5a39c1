"""Ctrl-C while a command starts, and afterwards; imports next to nothing, to be there early."""

import os
import signal
import sys


def end_at_once() -> None:
    """Let Ctrl-C end the process with one line, until ``raise_again``.

    Importing JAX takes seconds, and some code in it would swallow a KeyboardInterrupt. A process
    that ignores interrupts, such as a background job, goes on ignoring them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, where there is something to close and to report."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(*_) -> None:
    os.write(sys.stderr.fileno(), b"interrupted.\n")
    os._exit(128 + signal.SIGINT)
