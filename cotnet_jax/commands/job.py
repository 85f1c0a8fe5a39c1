"""What training and evaluating have in common: options, the start, and how they end."""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from absl import app, logging

from cotnet_jax import command_line, files, interrupt
from cotnet_jax.command_line import config_option

NOTES = """
Several processes, one for each host or GPU, make one run: srun, mpirun and TPU pods connect them
by themselves; elsewhere give each --coordinator_address, --num_processes and --process_id.

Exit codes: 0 finished, 1 error, 69 another process was lost (start all of them again), 75 stopped
by SIGTERM with the last step saved, 130 by Ctrl-C.
"""
REPLACED = {"--config.init_weights": "--config.init_kind"}


def make_parser(
    summary: str, examples: tuple[str, ...], *, several_weights: bool = False
) -> command_line.Parser:
    """Define the options, but for those of the configuration, which ``parse`` parses.

    Args:
      summary, examples: as of ``Parser``.
      several_weights: --weights may be repeated.
    """
    parser = command_line.Parser(summary, examples, notes=NOTES, replaced=REPLACED)
    config_option.add(parser)
    parser.add_argument(
        "--workdir",
        type=command_line.path,
        metavar="DIR",
        help="Folder of the run: checkpoints, metrics, configuration.",
    )
    command_line.add_weights(
        parser,
        "Weights to start from or to evaluate: a converted folder, another run's workdir or one "
        "of its checkpoints/STEP, a file of PyTorch or kecam, or hf-hub:OWNER/NAME.",
        several=several_weights,
    )
    parser.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="Where all processes meet process 0."
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="Processes of the run, on all hosts."
    )
    parser.add_argument(
        "--process_id", type=int, metavar="N", help="Number of this process, from 0."
    )
    parser.add_argument(
        "--local_device_ids",
        type=lambda text: text.split(","),
        metavar="N,...",
        help="This host's GPUs that belong to this process, such as 0,1.",
    )
    return parser


def parse(parser: command_line.Parser, arguments: list[str] | None) -> Any:
    """Return the options, with the configuration as ``config``, or exit with an error."""
    options, rest = config_option.parse(parser, arguments)
    _set_weights(parser, options, rest)
    return options


def _set_weights(parser, options, arguments) -> None:
    """Set config.init_from and config.init_kind by --weights and --kind."""
    config = options.config
    if config.init_from:
        try:
            config.init_from = files.expand(config.init_from)
        except ValueError as error:
            parser.error(f"--config.init_from={config.init_from}: {error}")
    for field, option in (("init_from", "weights"), ("init_kind", "kind")):
        value = getattr(options, option)
        typed = any(arg.split("=")[0] == f"--config.{field}" for arg in arguments)
        if value and typed and config[field] != value:
            parser.error(
                f"--{option}={value} and --config.{field}={config[field]} differ: give one of them"
            )
        if value:
            config[field] = value
    if options.kind and not config.init_from:
        parser.error(f"--kind={options.kind} needs --weights=PATH")


Work = Callable[[ml_collections.ConfigDict, str], tuple[Any, str]]


def run(load: Callable[[], Work], options: Any) -> None:
    """Work on a configuration, print the metrics, and exit with the code that NOTES documents.

    Args:
      load: imports and returns the work: a function of the configuration and the workdir that
        returns metrics, which are printed as JSON, and a text for people. The work is done after
        all processes have been connected.
      options: from ``parse``.
    """
    app.run(lambda _: _run(load, options), argv=sys.argv[:1])


def _run(load, options) -> None:
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.distributed import initialize

    logging.set_verbosity(logging.INFO)
    command_line.show_own_lines()
    with initialize.exit_without_waiting():
        _connect_and_work(load, options)


def _connect_and_work(load, options) -> None:
    import jax

    from cotnet_jax.checkpoint.checkpointer import CheckpointError
    from cotnet_jax.commands.compilation_cache import keep_compiled_programs
    from cotnet_jax.data.undecodable import UndecodableError
    from cotnet_jax.data.workers import WorkerLostError
    from cotnet_jax.distributed import initialize
    from cotnet_jax.distributed.preemption import EXIT_CODE, PreemptedError
    from cotnet_jax.training import out_of_memory
    from cotnet_jax.training.trainer import DivergedError

    work = load()
    # Their messages say what was wrong and what to do.
    explained = (
        ValueError,
        OSError,
        CheckpointError,
        DivergedError,
        UndecodableError,
        WorkerLostError,
    )
    try:
        # From here on an interrupt has more to close and to report.
        interrupt.raise_again()
        initialize.initialize(
            options.config.distributed,
            coordinator_address=options.coordinator_address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            local_device_ids=options.local_device_ids,
        )
        keep_compiled_programs()
        metrics, text = work(options.config, options.workdir)
    except explained as error:
        logging.debug("failed", exc_info=True)
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        logging.debug("failed", exc_info=True)
        sys.exit(f"error: {out_of_memory.explain(options.config, error)}")
    except PreemptedError as stop:
        print(f"stopped by SIGTERM: {stop}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print(
            "interrupted. The same command resumes from the newest checkpoint in "
            f"{options.workdir}/checkpoints.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    if initialize.is_first_process():
        print(json.dumps(metrics), flush=True)
        print(text, file=sys.stderr)


def summarize(metrics: Mapping[str, Any], path: str, *files: tuple[str, str]) -> str:
    """Return the accuracy in words, and what to do next.

    Args:
      metrics: of an evaluation.
      path: of the weights.
      *files: what to look at, and how.
    """
    names = {"raw": "raw weights", "ema": "EMA", "given": "given weights"}
    reached = ", ".join(
        f"{metrics[f'{kind}_top1']:.2f} % ({name})"
        for kind, name in names.items()
        if f"{kind}_top1" in metrics
    )
    lines = [
        *files,
        ("classify an image", f"{command_line.command('predict')} --weights={path} IMAGE"),
        ("continue in Python", f"model, variables = cotnet_jax.load({path!r})"),
    ]
    return "\n".join(
        [
            f"\nHeld-out top-1 of {metrics['count']} images: {reached}.",
            "Next:",
            *(f"  {what}:  {how}" for what, how in lines),
        ]
    )
