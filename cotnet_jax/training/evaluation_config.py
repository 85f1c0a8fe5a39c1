"""The configuration of an evaluation, from a run or from weights alone."""

import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from cotnet_jax import config as configuration
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.data.sources import find_evaluation_split
from cotnet_jax.weights.loading import read_settings, run_of
from cotnet_jax.weights.torch_files import Kind

# They say how a run started, not how it is evaluated.
_OF_THE_START = ("init_from", "init_kind", "accept_classes", "resume.allow_changes")


def evaluation_config(
    default: ml_collections.ConfigDict,
    *,
    workdir: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    kind: Kind | None = None,
    data: str | None = None,
    split: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ml_collections.ConfigDict:
    """Return the configuration to evaluate a run or weights with.

    The settings are those of the run, also where ``weights`` are a run's workdir or one of its
    checkpoints; of other weights, their model and how its images are prepared are known.

    Args:
      default: as in configs/default.py; gives all other fields.
      workdir: a run, whose best checkpoint is evaluated where there are no weights.
      weights: what ``cotnet_jax.load`` takes.
      kind: of the weights, "ema" or "raw".
      data: a prepared folder or the name of a dataset; None is the run's.
      split: to evaluate on; None is the run's on its own data, and of others "validation" or else
        "test".
      overrides: {"section.field": value}, which come last.

    Raises:
      ValueError: neither ``workdir`` nor ``weights``, or no data are given; or the run's
        configuration, the weights or the dataset cannot be used.
      FileNotFoundError: there are no such weights, or no run in the workdir.
    """
    overrides = dict(overrides or {})
    if workdir is None and weights is None:
        raise ValueError("nothing to evaluate: give --workdir=DIR or --weights=PATH")
    run = Workdir(workdir) if workdir is not None else run_of(weights or "")
    if run is not None:
        config = _config_of(run, default)
    else:
        config = default.copy_and_resolve_references()
        config.update_from_flattened_dict(
            read_settings(weights or "", kind, overrides.get("model.name"))
        )
        if not data and "data.name" not in overrides:
            raise ValueError(
                f"{weights}: these weights do not say which images to evaluate them on; give "
                "--data=FOLDER of a prepared folder, or --data=NAME of a dataset"
            )
    config.init_from, config.init_kind = str(weights or ""), kind or ""
    if data:
        config.data.name, config.data.fake = data, False
        # Other images than the run's are what was asked for.
        config.resume.allow_changes = "data.name,data.fake"
    config.update_from_flattened_dict(overrides)
    if split:
        config.data.eval_split = split
    elif data and "data.eval_split" not in overrides:
        config.data.eval_split = find_evaluation_split(config.data)
    return config


def _config_of(run: Workdir, default: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    try:
        saved = run.read_config()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{run}: no run in it (no {run.config.name}); give --workdir=DIR of a training run, or "
            "--weights=PATH"
        ) from None
    try:
        config = configuration.restore(default, saved)
    except ValueError as error:
        raise ValueError(f"{run.config}: {error}") from None
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                field: value
                for field, value in configuration.flatten(default).items()
                if field in _OF_THE_START
            }
        )
    return config
