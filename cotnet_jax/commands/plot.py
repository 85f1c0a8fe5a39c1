"""``cotnet-plot``: draw the curves of a run, or of several in one figure."""

import sys
from pathlib import Path
from typing import Any

from cotnet_jax import command_line, interrupt

SUMMARY = "Draw loss, top-1, learning rate and speed of a run, or compare runs in one figure."
EXAMPLES = (
    "cotnet-plot runs/digits",
    "cotnet-plot runs/* --output=compared.png",
    "cotnet-plot runs/50 runs/101",
)
_NAME = "curves.png"


def main(arguments: list[str] | None = None) -> None:
    interrupt.end_at_once()
    options = parse(arguments)
    from cotnet_jax.reports import curves

    try:
        curves.write(options.runs, options.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(options.output)


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(SUMMARY, EXAMPLES)
    parser.add_argument(
        "runs",
        nargs="*",
        type=command_line.path,
        metavar="RUN",
        required=True,
        help="Workdirs of runs, running ones too.",
    )
    parser.add_argument(
        "--output",
        type=command_line.path,
        metavar="FILE",
        help=f"A PNG file; by default {_NAME} in the workdir, or here for several runs.",
    )
    return parser


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    options = make_parser().parse_args(arguments)
    folder = options.runs[0] if len(options.runs) == 1 else ""
    options.output = options.output or str(Path(folder, _NAME).absolute())
    return options
