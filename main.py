"""Train or evaluate a CoTNet: cotnet-train and cotnet-evaluate, without installing."""

import argparse
import sys

from cotnet_jax import interrupt

if __name__ == "__main__":
    # Before everything that takes longer to import.
    interrupt.end_at_once()

from typing import Any

from cotnet_jax.commands import evaluate, train

MODES = {"train": train, "evaluate": evaluate}


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Each mode has options of its own, and its parser refuses what is no mode.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode", nargs="?")
    mode = MODES.get(first.parse_known_args(arguments)[0].mode, train)
    parser = mode.make_parser()
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        default="train",
        help="What to do (%(default)s); --mode=evaluate --help has the options of evaluating.",
    )
    return mode.parse(arguments, parser)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    MODES[options.mode].run(options)


if __name__ == "__main__":
    main()
