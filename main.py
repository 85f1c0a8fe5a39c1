"""Trains or evaluates a CoTNet.

    python main.py --config=configs/cotnet50.py --workdir=DIR [--mode=train|evaluate]
        [--config.FIELD=VALUE ...]

The same command again goes on where the run in DIR stopped.
"""

import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cotnet_jax.checkpoint import CheckpointError
from cotnet_jax.train import DivergedError, evaluate_only, train

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Configuration, a file of configs/.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, settings.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "evaluate takes the best checkpoint, or init_from."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.INFO)
    run = {"train": train, "evaluate": evaluate_only}[MODE.value]
    try:
        figures = run(CONFIG.value, WORKDIR.value)
    except (ValueError, OSError, CheckpointError, DivergedError) as error:
        logging.debug("failed", exc_info=True)
        sys.exit(f"error: {error}")
    print(json.dumps(figures))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
