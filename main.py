"""Train or evaluate a CoTNet; see ``python main.py --help``."""

import json
import os
import re
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def end_at_once(*_):
        os.write(sys.stderr.fileno(), b"interrupted.\n")
        os._exit(128 + signal.SIGINT)

    # Importing JAX takes seconds, and some code in it would swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, end_at_once)

from absl import app, flags, logging
from ml_collections import config_flags

from cotnet_jax import command_line, files

SUMMARY = "Train or evaluate a CoTNet. The same command again continues where the run stopped."
EXAMPLES = (
    "python main.py --config=configs/digits.py --workdir=runs/digits",
    "python main.py --config=configs/cotnet50.py --workdir=runs/cotnet50 --config.batch_size=512",
    "python main.py --config=configs/cotnet50.py --mode=evaluate --weights=cotnet50.pth.tar",
)
NOTES = """
Several processes, one for each host or GPU, make one run: srun, mpirun and TPU pods connect them
by themselves; elsewhere start each with the last four options.

Exit codes: 0 finished, 1 error, 69 another process was lost (start all of them again), 75 stopped
by SIGTERM with the last step saved, 130 by Ctrl-C.
"""
REPLACED = {"--config.init_weights": "--config.init_kind"}
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def make_parser():
    """Define the options, but for those of the configuration, which absl parses."""
    parser = command_line.Parser(SUMMARY, EXAMPLES, notes=NOTES, replaced=REPLACED)
    parser.describe("--config=FILE", "Configuration, a file of configs/.")
    parser.describe(
        "--config.FIELD=VALUE",
        "Override a field; configs/default.py explains them all.",
    )
    parser.add_argument(
        "--workdir",
        type=command_line.path,
        metavar="DIR",
        help="Folder of the run: checkpoints, metrics, configuration.",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "evaluate"),
        default="train",
        help="evaluate measures --weights or else the run's best checkpoint.",
    )
    command_line.add_weights(
        parser,
        "Weights to start from or to evaluate: a converted folder, another run's workdir or one "
        "of its checkpoints/STEP, or a PyTorch file.",
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


def parse(argv):
    """Return the options; those of the configuration are in ``CONFIG.value``."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv[1:])
    unknown = parser.unknown(parse_config(parser, [argv[0], *rest]), "--config")
    if unknown:
        parser.error("; ".join(unknown))
    if not CONFIG.value:
        parser.error_with_examples("--config=FILE is missing")
    set_weights(parser, options, CONFIG.value, rest)
    if not options.workdir and not (options.mode == "evaluate" and CONFIG.value.init_from):
        parser.error_with_examples(
            "--workdir=DIR is missing; only --mode=evaluate --weights=PATH needs none"
        )
    return options


def parse_config(parser, argv):
    """Let absl parse the configuration, and return the arguments that it does not know."""
    try:
        rest = flags.FLAGS(expand_config_file(parser, argv), known_only=True)
        # A file that cannot be loaded is an error when it is used.
        if CONFIG.value:
            _ = CONFIG.value.init_from
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        parser.error(explain(error, argv))
    return rest[1:]


def expand_config_file(parser, argv):
    """Return the arguments with ``~`` replaced in --config=~/FILE, where no shell replaces it."""
    option = "--config="

    def expand(argument):
        path = argument.removeprefix(option)
        if path == argument or not path.startswith("~"):
            return argument
        try:
            return option + files.expand(path)
        except ValueError as error:
            parser.error(f"{argument}: {error}")

    return [expand(argument) for argument in argv]


def explain(error, argv):
    """Return an error of ml_collections in one line, with the option that caused it."""
    text = str(error.args[0] if error.args else error)
    if isinstance(error, (AttributeError, KeyError)):
        # The last line is the unknown key, or names the nearest one before it.
        unknown, *near = reversed(re.findall(r"['\"](\w+)['\"]", text.splitlines()[-1]))
        given = [arg for arg in argv if f".{unknown}" in arg.split("=")[0]]
        if given:
            hint = f", did you mean {near[0]}?" if near else "."
            return f"{', '.join(given)}: no such field{hint} configs/default.py has them all."
    for argument in argv:
        name, _, path = argument.partition("=")
        if name == "--config" and path and not os.path.exists(path.split(":")[0]):
            return f"{argument}: no such file"
    return " ".join(text.removeprefix("flag ").split())


def set_weights(parser, options, config, arguments):
    """Set config.init_from and config.init_kind by --weights and --kind."""
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


def main(options):
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.distributed import initialize

    logging.set_verbosity(logging.INFO)
    with initialize.exit_without_waiting():
        run(options)


def run(options):
    """Train or evaluate, print the metrics, and exit with the code that NOTES documents."""
    from cotnet_jax.checkpoint.checkpointer import CheckpointError
    from cotnet_jax.data.undecodable import UndecodableError
    from cotnet_jax.data.workers import WorkerLostError
    from cotnet_jax.distributed import initialize
    from cotnet_jax.distributed.preemption import EXIT_CODE, PreemptedError
    from cotnet_jax.training.evaluate import evaluate_only
    from cotnet_jax.training.loop import train
    from cotnet_jax.training.trainer import DivergedError

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
        # From here on an interrupt has more to close and to report. Background jobs may ignore it.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        initialize.initialize(
            CONFIG.value.distributed,
            coordinator_address=options.coordinator_address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            local_device_ids=options.local_device_ids,
        )
        if options.mode == "train":
            metrics = train(CONFIG.value, options.workdir)
        else:
            metrics = evaluate_only(CONFIG.value, options.workdir)
    except explained as error:
        logging.debug("failed", exc_info=True)
        sys.exit(f"error: {error}")
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
        print(summary(metrics, options.workdir), file=sys.stderr)


def summary(metrics, workdir):
    """Return the accuracy in words, and what to do next."""
    names = {"raw": "raw weights", "ema": "EMA", "given": "given weights"}
    reached = ", ".join(
        f"{metrics[f'{kind}_top1']:.2f} % ({name})"
        for kind, name in names.items()
        if f"{kind}_top1" in metrics
    )
    given = "given_top1" in metrics
    path = CONFIG.value.init_from if given else workdir
    curves = "" if given else f"\n  look at the curves:  tensorboard --logdir={path}/tensorboard"
    return f"""
Held-out top-1 of {metrics["count"]} images: {reached}.
Next:
  classify an image:  python -m cotnet_jax.predict --weights={path} IMAGE{curves}
  continue in Python:  model, variables = cotnet_jax.load({path!r})"""


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
