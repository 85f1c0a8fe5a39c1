"""Trains or evaluates a CoTNet.

    python main.py --config=configs/cotnet50.py --workdir=DIR [--mode=train|evaluate]
        [--config.FIELD=VALUE ...]

The same command again goes on where the run in DIR stopped. --mode=evaluate takes the run's best
checkpoint, or without --workdir what --config.init_from=PATH names.

Several processes, one a host or one a GPU, are one run: under srun, mpirun or on a TPU pod by
themselves, elsewhere each with --coordinator_address=HOST:PORT --num_processes=N and
--process_id=0 to N-1.

Exit codes: 0 finished, 1 error, 69 another process was lost (start all of them again), 75 stopped
by SIGTERM with the last step saved, 130 by Ctrl-C.
"""

import json
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def end_at_once(*_):
        os.write(sys.stderr.fileno(), b"interrupted.\n")
        os._exit(128 + signal.SIGINT)

    # The imports below take seconds, and some code in them would swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, end_at_once)

from absl import app, flags, logging
from ml_collections import config_flags

from cotnet_jax.checkpoint.checkpointer import CheckpointError
from cotnet_jax.data.pipeline import UndecodableError
from cotnet_jax.data.workers import WorkerLostError
from cotnet_jax.distributed import initialize
from cotnet_jax.distributed.preemption import EXIT_CODE, PreemptedError
from cotnet_jax.training.evaluate import evaluate_only
from cotnet_jax.training.loop import train
from cotnet_jax.training.trainer import DivergedError

# Their messages say what was wrong and what to do.
EXPLAINED = (
    ValueError,
    OSError,
    CheckpointError,
    DivergedError,
    UndecodableError,
    WorkerLostError,
)
CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Configuration, a file of configs/.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, settings.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "evaluate takes the best checkpoint, or init_from."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where all processes meet."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, on all hosts.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "Numbers of this host's GPUs that are this process's, like 0,1."
)


def parse(argv):
    """absl's own parser, with one line for a field that the configuration does not have."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:
        # ml_collections names the unknown key and the nearest one, in a KeyError's quotes.
        reason = " ".join(str(error.args[0] if error.args else error).replace("\n", ". ").split())
        given = ", ".join(a for a in argv[1:] if a.startswith("--config."))
        sys.exit(
            f"error: the configuration does not take one of {given}: {reason} "
            "All fields are in configs/default.py."
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    if not WORKDIR.value and not (MODE.value == "evaluate" and CONFIG.value.init_from):
        raise app.UsageError(
            "--workdir=DIR is missing; only --mode=evaluate with --config.init_from=PATH needs none"
        )
    logging.set_verbosity(logging.INFO)
    with initialize.exit_without_waiting():
        run_and_tell()


def run_and_tell():
    run = {"train": train, "evaluate": evaluate_only}[MODE.value]
    try:
        # From here on there is more to say and to close. In the background it may be ignored.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        initialize.initialize(
            CONFIG.value.distributed,
            coordinator_address=COORDINATOR_ADDRESS.value,
            num_processes=NUM_PROCESSES.value,
            process_id=PROCESS_ID.value,
            local_device_ids=LOCAL_DEVICE_IDS.value,
        )
        metrics = run(CONFIG.value, WORKDIR.value)
    except EXPLAINED as error:
        logging.debug("failed", exc_info=True)
        sys.exit(f"error: {error}")
    except PreemptedError as stop:
        print(f"stopped by SIGTERM: {stop}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print(
            "interrupted. The same command goes on after the newest checkpoint in "
            f"{WORKDIR.value}/checkpoints.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    if initialize.is_first_process():
        print(json.dumps(metrics), flush=True)
        print(summary(metrics), file=sys.stderr)


def summary(metrics):
    """What was reached, and what to do next."""
    names = {"raw": "raw weights", "ema": "EMA", "given": "given weights"}
    reached = ", ".join(
        f"{metrics[f'{kind}_top1']:.2f} % ({name})"
        for kind, name in names.items()
        if f"{kind}_top1" in metrics
    )
    given = "given_top1" in metrics
    path = CONFIG.value.init_from if given else WORKDIR.value
    curves = "" if given else f"\n  look at the curves:  tensorboard --logdir={path}/tensorboard"
    return f"""
Held-out top-1 of {metrics["count"]} images: {reached}.
Next:
  classify an image:  python -m cotnet_jax.predict --weights={path} IMAGE{curves}
  go on in Python:     model, variables = cotnet_jax.load({path!r})"""


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
