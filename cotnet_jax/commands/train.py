"""``cotnet-train``: train a CoTNet, or continue a run."""

from typing import Any

from cotnet_jax import command_line, interrupt
from cotnet_jax.commands import job

SUMMARY = "Train a CoTNet. The same command again continues where the run stopped."
EXAMPLES = (
    "cotnet-train --config=digits --workdir=runs/digits",
    "cotnet-train --config=cotnet50 --workdir=runs/50 --config.batch_size=512",
    "cotnet-train --config=./mine.py --workdir=runs/mine --weights=runs/50",
)


def main(arguments: list[str] | None = None) -> None:
    interrupt.end_at_once()
    run(parse(arguments))


def make_parser() -> command_line.Parser:
    """Define the options, but for those of the configuration."""
    return job.make_parser(SUMMARY, EXAMPLES)


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    parser = make_parser()
    options = job.parse(parser, arguments)
    check(parser, options)
    return options


def check(parser: command_line.Parser, options: Any) -> None:
    """Exit with an error if training needs more options."""
    if not options.workdir:
        parser.error_with_examples("--workdir=DIR is missing")


def run(options: Any) -> None:
    """Train, and exit."""

    def load():
        from cotnet_jax.training.loop import train

        return train

    job.run(load, options)
