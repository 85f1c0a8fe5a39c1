"""``cotnet-evaluate``: measure the accuracy of a run's best checkpoint, or of any weights."""

from typing import Any

from cotnet_jax import command_line, interrupt
from cotnet_jax.commands import job

SUMMARY = "Measure the accuracy of a run's best checkpoint, or of the weights that are given."
EXAMPLES = (
    "cotnet-evaluate --config=digits --workdir=runs/digits",
    "cotnet-evaluate --config=cotnet50 --weights=cotnet50.pth.tar",
    "cotnet-evaluate --config=digits --weights=runs/digits --kind=raw",
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
    """Exit with an error if evaluating needs more options."""
    if not options.workdir and not options.config.init_from:
        parser.error_with_examples("--workdir=DIR is missing; only with --weights=PATH it may be")


def run(options: Any) -> None:
    """Evaluate, and exit."""

    def load():
        from cotnet_jax.training.evaluate import evaluate_only

        return evaluate_only

    job.run(load, options)
