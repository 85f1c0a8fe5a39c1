"""Train or evaluate a CoTNet: cotnet-train and cotnet-evaluate, without installing."""

from cotnet_jax import interrupt

if __name__ == "__main__":
    # Before everything that takes longer to import.
    interrupt.end_at_once()

from typing import Any

from cotnet_jax import command_line
from cotnet_jax.commands import evaluate, job, train

MODES = {"train": train, "evaluate": evaluate}
SUMMARY = "Train or evaluate a CoTNet. The same command again continues where the run stopped."


def make_parser() -> command_line.Parser:
    """Define the options, but for those of the configuration."""
    parser = job.make_parser(SUMMARY, (*train.EXAMPLES[:2], evaluate.EXAMPLES[1]))
    parser.add_argument(
        "--mode",
        choices=tuple(MODES),
        default="train",
        help="evaluate measures --weights or else the run's best checkpoint.",
    )
    return parser


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    parser = make_parser()
    options = job.parse(parser, arguments)
    MODES[options.mode].check(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    MODES[options.mode].run(options)


if __name__ == "__main__":
    main()
