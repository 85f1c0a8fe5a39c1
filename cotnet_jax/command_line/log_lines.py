"""What a command shows of the log: its own lines, and other packages' warnings."""

import logging
from pathlib import Path

import absl.logging

_PACKAGE = str(Path(__file__).parents[1])


def show_own_lines() -> None:
    """Hide what other packages merely mention, such as that there is no TPU.

    Their warnings and errors stay, each as one line: a plugin that fails to start, because its
    hardware is missing, would else print a traceback of pages.
    """
    handler = absl.logging.get_absl_handler()
    if not any(isinstance(each, _OwnLines) for each in handler.filters):
        handler.addFilter(_OwnLines())


def show_warnings() -> None:
    """Hide all but warnings and errors: messages of the libraries would bury a report."""
    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.WARNING)


class _OwnLines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.pathname.startswith(_PACKAGE):
            return True
        if record.exc_info and record.name.startswith("jax."):
            record.msg = f"{record.getMessage()}: {record.exc_info[1]}".splitlines()[0]
            record.args, record.exc_info, record.exc_text = (), None, None
        return record.levelno >= logging.WARNING
