"""``cotnet-benchmark``: measure the speed of a configuration's training step."""

import sys
from typing import Any

from absl import app

from cotnet_jax import command_line
from cotnet_jax.command_line import config_option

EXAMPLES = (
    "cotnet-benchmark --config=cotnet50",
    "cotnet-benchmark --config=cotnet50 --config.batch_size=256",
    "cotnet-benchmark --config=digits --trace=profile",
)
NOTES = """
Prints one line for each variant of the step: milliseconds, images a second, and the time relative
to the first variant. The batch is noise that stays on the device: no dataset is needed, and the
input pipeline is left out.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    app.run(lambda _: _run(options), argv=sys.argv[:1])


def _run(options: Any) -> None:
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.commands.compilation_cache import keep_compiled_programs
    from cotnet_jax.tools import benchmark_step

    keep_compiled_programs()
    try:
        benchmark_step.benchmark(options.config, options.variants, options.trace)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    return config_option.parse(make_parser(), arguments)[0]


def make_parser() -> command_line.Parser:
    """Define the options, but for those of the configuration."""
    parser = command_line.Parser(
        "Measure the speed of a configuration's training step.", EXAMPLES, notes=NOTES
    )
    config_option.add(parser)
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="Variants of the step to time; by default all, the step as configured first.",
    )
    parser.add_argument(
        "--trace",
        type=command_line.path,
        metavar="DIR",
        help="Folder to write a profile of a few steps to, for TensorBoard or xprof.",
    )
    return parser
