"""What commands share: the style of help and errors, options, and how a command is called."""

from cotnet_jax.command_line.errors import first_line
from cotnet_jax.command_line.invocation import as_typed, command
from cotnet_jax.command_line.log_lines import show_own_lines, show_warnings
from cotnet_jax.command_line.parser import (
    KINDS,
    Parser,
    add_classes,
    add_model,
    add_weights,
    path,
    positive,
    positives,
    print_any_name,
)

__all__ = [
    "KINDS",
    "Parser",
    "add_classes",
    "add_model",
    "add_weights",
    "as_typed",
    "command",
    "first_line",
    "path",
    "positive",
    "positives",
    "print_any_name",
    "show_own_lines",
    "show_warnings",
]
