"""The configuration of an evaluation, from a run or from weights alone."""

import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.config import expand_paths, flatten, restore
from cotnet_jax.configs import default
from cotnet_jax.data.sources import find_evaluation_split
from cotnet_jax.weights.loading import read_settings, run_of
from cotnet_jax.weights.torch_files import Kind

# They say how a run started, not how it is evaluated.
_OF_THE_START = ("init_from", "init_kind", "accept_classes", "resume.allow_changes")


def evaluation_config(
    config: ml_collections.ConfigDict | None = None,
    *,
    workdir: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    kind: Kind | None = None,
    data: str | None = None,
    split: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> ml_collections.ConfigDict:
    """Return the configuration to evaluate a run or weights with.

    Args:
      config: as in configs/default.py. None takes that of the run, also where ``weights`` are a
        run's workdir or one of its checkpoints; other weights say their model and how its images
        are prepared, and the rest is that of configs/default.py.
      workdir: a run, whose best checkpoint is evaluated where there are no weights.
      weights: what ``cotnet_jax.load`` takes.
      kind: of the weights, "ema" or "raw".
      data: a prepared folder or the name of a dataset; None is the run's.
      split: to evaluate on; None is the run's on its own data, and of others "validation" or else
        "test".
      fields: {"section.field": value}, which come last.

    Raises:
      ValueError: neither ``workdir`` nor ``weights`` are given, or no data for weights that are
        of no run; or the run's configuration, the weights or the dataset cannot be used.
      FileNotFoundError: there are no such weights, or no run in the workdir.
    """
    fields = dict(fields or {})
    if workdir is None and weights is None:
        raise ValueError("nothing to evaluate: give --workdir=DIR or --weights=PATH")
    if config is not None:
        config = config.copy_and_resolve_references()
    elif workdir is not None:
        config = _config_of(Workdir(workdir))
    else:
        assert weights is not None
        run = run_of(weights)
        config = _config_of(run) if run else _config_for(weights, kind, data, fields)
    config.init_from, config.init_kind = str(weights or ""), kind or ""
    if data:
        config.data.name, config.data.fake = data, False
        # Other images than the run's are what was asked for.
        config.resume.allow_changes = "data.name,data.fake"
    config.update_from_flattened_dict(fields)
    if split:
        config.data.eval_split = split
    elif data and "data.eval_split" not in fields:
        config.data.eval_split = find_evaluation_split(config.data)
    return expand_paths(config)


def _config_of(run: Workdir) -> ml_collections.ConfigDict:
    try:
        saved = run.read_config()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{run}: no run in it (no {run.config.name}); give --workdir=DIR of a training run, or "
            "--weights=PATH"
        ) from None
    start = default.get_config()
    try:
        config = restore(start, saved)
    except ValueError as error:
        raise ValueError(f"{run.config}: {error}") from None
    of_the_start = {name: flatten(start)[name] for name in _OF_THE_START}
    config.update_from_flattened_dict(of_the_start)
    return config


def _config_for(weights, kind, data, fields) -> ml_collections.ConfigDict:
    config = default.get_config()
    config.update_from_flattened_dict(read_settings(weights, kind, fields.get("model.name")))
    if not data and "data.name" not in fields:
        raise ValueError(
            f"{weights}: these weights do not say which images to evaluate them on; give "
            "--data=FOLDER of a prepared folder, or --data=NAME of a dataset"
        )
    return config
