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


def parse(arguments: list[str] | None = None, parser: command_line.Parser | None = None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    parser = parser or make_parser()
    options = job.parse(parser, arguments)
    if not options.workdir:
        parser.error_with_examples("--workdir=DIR is missing")
    return options


def run(options: Any) -> None:
    """Train, and exit."""

    def load():
        from cotnet_jax.distributed.initialize import is_first_process
        from cotnet_jax.reports import curves
        from cotnet_jax.training import loop

        def train(config, workdir):
            metrics = loop.train(config, workdir)
            if is_first_process():
                curves.write_after_training(workdir)
            look = ("look at the curves", f"tensorboard --logdir={workdir}/tensorboard")
            return metrics, job.summarize(metrics, workdir, look)

        return train

    job.run(load, options)
