"""Workdirs as runs of cotnet_tiny leave them, without training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cotnet_jax
from cotnet_jax.checkpoint.checkpointer import Checkpointer
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.weights import name_map
from helpers import golden

CLASSES = 10
CONFIG = {
    "model": {"name": "cotnet_tiny", "output_stride": 16},
    "data": {
        "name": "digits",
        "image_size": 40,
        "crop": 0.9,
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    },
    "ema": {"decay": 0.999},
}


def variables_of(seed: int) -> dict[str, dict]:
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=CLASSES)
    return cotnet_jax.from_torch_state_dict("cotnet_tiny", golden.state_dict(shapes, seed))


def equal(first: Any, second: Any) -> bool:
    """Whether two trees of arrays are the same, bit by bit."""
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def make_workdir(
    path: Path,
    config: dict = CONFIG,
    steps: Sequence[tuple[int, float | None]] = ((1, 30.0), (2, 50.0), (3, 40.0)),
    ema: bool = True,
    variables: Callable[[int], dict[str, dict]] = variables_of,
) -> Path:
    """A run's folder: raw weights of step s are those of seed 10 + s, averages 20 + s.

    Args:
      path: the folder to make.
      config: the fields of the configuration that loading reads.
      steps: (step, top-1) of each checkpoint.
      ema: whether there is one.
      variables: seed -> variables.
    """
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    optimizer = optax.sgd(0.1)
    metric = "ema_top1" if ema else "raw_top1"
    with Checkpointer(path / "checkpoints", keep_best=3, best_metric=metric) as checkpointer:
        for step, top1 in steps:
            raw = jax.tree.map(jnp.asarray, variables(10 + step))
            state = TrainState(
                step=jnp.asarray(step, jnp.int32),
                params=raw["params"],
                batch_stats=raw["batch_stats"],
                ema=jax.tree.map(jnp.asarray, variables(20 + step)) if ema else None,
                opt_state=optimizer.init(raw["params"]),
                key=jax.random.key_data(jax.random.key(0)),
            )
            checkpointer.save(state, {metric: top1} if top1 is not None else None)
    return path
