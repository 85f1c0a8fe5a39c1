"""What a run is, on one screen, before its first step."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.data.parallelism import choose_parallelism
from cotnet_jax.models.stages import split_by_stage
from cotnet_jax.training.setup import TrainSetup


def start_summary(setup: TrainSetup, params: Mapping[str, Any], workdir: Workdir) -> str:
    """Return the summary of a run, a few lines of text; the long tables are in the workdir.

    Args:
      setup: what the configuration resolves to.
      params: nested dict of arrays or ``jax.ShapeDtypeStruct``.
      workdir: the run's folder.
    """
    config, rates = setup.config, setup.learning_rates
    sizes = {stage: _size(tree) for stage, tree in split_by_stage(params).items()}
    peak = int(np.argmax(rates))
    unit = config.schedule.unit
    side = config.data.image_size
    kinds = sorted({device.device_kind for device in setup.mesh.devices.flat})
    rows = {
        "Model": f"{config.model.name}, {sum(sizes.values()):,} parameters, activations in "
        f"{setup.model.dtype}",
        "": ", ".join(f"{stage} {size:,}" for stage, size in sizes.items()),
        "Devices": f"{setup.mesh.size} x {', '.join(kinds)}",
        "Classes": f"{setup.model.num_classes:,}",
        "Images": f"{len(setup.train_source):,} to train ({config.data.train_split}), "
        f"{len(setup.eval.eval_source):,} to evaluate ({config.data.eval_split}), {side} x {side}",
        "Input": _input(setup),
        "Steps": f"{setup.total_steps:,} of {config.batch_size:,} images, "
        f"{setup.steps_per_epoch:,} an epoch; evaluated every {setup.steps_per_eval:,}",
        "Schedule": f"learning rate {rates[0]:.4g}, {rates[peak]:.4g} from {unit} {peak + 1} of "
        f"{len(rates)}, {rates[-1]:.4g} in the last",
        "Config": str(workdir.config),
        "Files": f"{workdir}: parameters.txt, metrics.jsonl, checkpoints/, starts.jsonl (versions)",
        "Curves": f"tensorboard --logdir={workdir.tensorboard}",
    }
    return "\n".join(f"{name + ':' * bool(name):10}{text}" for name, text in rows.items())


def _input(setup: TrainSetup) -> str:
    config, processes = setup.config, jax.process_count()
    rows = [size // processes for size in (config.batch_size, config.eval.batch_size)]
    made_by = [choose_parallelism(config.data, number) for number in rows]
    num_bytes = sum(
        each.num_bytes(number, config.data.image_size)
        for each, number in zip(made_by, rows, strict=True)
    )
    train, evaluation = made_by
    return f"{train} to train, {evaluation} to evaluate, about {num_bytes / 1e9:.1f} GB of memory"


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
