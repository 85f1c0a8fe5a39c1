"""Evaluate weights on a whole split, every image counted once."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from cotnet_jax import command_line
from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.config import weight_kinds
from cotnet_jax.data.normalize import normalize
from cotnet_jax.data.sources import Synthetic
from cotnet_jax.data.undecodable import Batch
from cotnet_jax.distributed import sharding
from cotnet_jax.distributed.sharding import DATA_AXIS, REPLICATED, SHARDED, prefetch_to_device
from cotnet_jax.distributed.watchdog import Watchdog
from cotnet_jax.training.compiling import with_kernels_side_by_side
from cotnet_jax.training.evaluators import Evaluator
from cotnet_jax.training.predictions import PredictionCollector, Predictions, top_predictions
from cotnet_jax.training.progress import format_duration
from cotnet_jax.training.setup import EvalSetup, set_up_evaluation
from cotnet_jax.weights import read_weights
from cotnet_jax.weights.class_order import match_classes
from cotnet_jax.weights.loading import check_values

SECONDS_BETWEEN_LINES = 10.0


class PredictionsError(ValueError):
    """The predictions of some weights are not finite."""


def evaluate_only(
    config: ml_collections.ConfigDict, workdir: str | Path | None
) -> dict[str, float]:
    """Evaluate config.init_from, or else the best checkpoint of the run in workdir.

    Returns:
      The metrics of ``EvalLoop.run``, for "raw" and "ema" weights of a run, or "given" ones of
      config.init_from.

    Raises:
      ValueError, FileNotFoundError: there are no such weights, they are of another model, or they
        or their predictions are no usable numbers.
      CheckpointError: the run has no checkpoint that can be read.
    """
    setup = set_up_evaluation(config)
    weights = find_weights(setup, workdir).variables
    with open_eval_loop(setup) as eval_loop:
        return eval_loop.run(weights)


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """Weights to evaluate on the data of a setup, with its classes.

    Attributes:
      path: where they were read.
      step: the training step that they are of, where that is known.
      kind: "ema" or "raw", of the last ones of ``variables``.
      variables: {kind: {"params", "batch_stats"}}: "raw" and "ema" weights of a run, or "given".
    """

    path: str
    step: int | None
    kind: str
    variables: dict[str, dict]


def find_weights(setup: EvalSetup, workdir: str | Path | None) -> FoundWeights:
    """Read setup.config.init_from, or else the best checkpoint of the run in workdir.

    Without setup.config.init_kind these are the run's raw weights and its EMA.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: as ``evaluate_only``.
    """
    config = setup.config
    names = None
    if config.init_from:
        read = read_weights(config.init_from, config.init_kind or None, config.model.name)
        for note in read.notes:
            logging.info("%s", note)
        step, kind, names = read.source.get("step"), read.kind, read.class_names
        weights: dict[str, dict] = {"given": read.variables}
    elif workdir is None:
        raise ValueError("nothing to evaluate: give a workdir, or weights by config.init_from")
    else:
        workdir = Workdir(workdir)
        workdir.check_config(config)
        with open_checkpoints(workdir, config, read_only=True) as checkpointer:
            choice = "latest" if checkpointer.best_step() is None else "best"
            weights = {}
            for kind in [config.init_kind] if config.init_kind else weight_kinds(config):
                step, weights[kind] = checkpointer.restore_step_and_weights(choice, kind)
        names = workdir.class_names(config.data.name)
        for kind, variables in weights.items():
            check_values(variables, f"{workdir}: the {kind} weights")
    path = str(config.init_from or workdir)
    for key, variables in weights.items():
        _check_classes(variables, setup)
        weights[key] = match_classes(
            variables,
            None if isinstance(setup.eval_source, Synthetic) else names,
            setup.eval_source.class_names,
            weights=path,
            accept=config.accept_classes,
        )
    return FoundWeights(path=path, step=step, kind=kind, variables=weights)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass over the evaluation split found.

    Attributes:
      metrics: {"count": images of the split} and the metrics of each evaluator, such as KIND_top1.
      counts: {kind: {evaluator's name: its summed counts}}.
      predictions: {kind: its predictions}; {} where the setup is not for a report.
      seconds: that the pass took.
    """

    metrics: dict[str, float]
    counts: dict[str, dict[str, dict[str, np.ndarray]]]
    predictions: dict[str, Predictions]
    seconds: float


class EvalLoop:
    """Evaluate weights on the evaluation split, as often as asked for.

    A context manager: the threads and workers that read images start with the first pass, serve
    all of them, and end with the context.

    Args:
      setup: the network, the data and the evaluators.
      watchdog: the run's; guards each batch.
    """

    def __init__(self, setup: EvalSetup, watchdog: Watchdog):
        self._setup = setup
        self._watchdog = watchdog
        eval_step = make_eval_step(
            setup.model,
            setup.evaluators,
            mesh=setup.mesh,
            mean=setup.config.data.mean,
            std=setup.config.data.std,
            per_image=top_predictions if setup.report else None,
        )
        self._eval_step = with_kernels_side_by_side(eval_step)
        self._batches = setup.eval_batches()

    def __enter__(self) -> "EvalLoop":
        return self

    def __exit__(self, *_) -> None:
        self._batches.close()

    def run(
        self, weights: dict[str, dict], after_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Evaluate weights in one pass over the split, and log a line for each kind of them.

        Args:
          weights: {kind: {"params", "batch_stats"}}; all see each batch once.
          after_batch: called after each batch; an exception that it raises ends the evaluation.

        Returns:
          The metrics of ``evaluate``.

        Raises:
          PredictionsError: a metric is not finite, because predictions are not.
        """
        return self.evaluate(weights, after_batch).metrics

    def evaluate(
        self, weights: dict[str, dict], after_batch: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Do what ``run`` does, and return all that the pass found."""
        setup, mesh = self._setup, self._setup.mesh
        start = time.monotonic()
        batches: Iterable[Batch] = itertools.islice(self._batches, setup.steps_per_pass)
        collector = PredictionCollector(setup.config.eval.batch_size) if setup.report else None
        if collector:
            batches = collector.number(batches)
        counts = sum_counts(
            self._eval_step,
            sharding.replicate(mesh, weights),
            self._watchdog.guard(prefetch_to_device(mesh, batches)),
            total=len(setup.eval_source),
            after_batch=after_batch,
            keep=collector.add if collector else None,
        )
        predictions = collector.collect() if collector else {}
        seconds = time.monotonic() - start
        metrics: dict[str, float] = {}
        for kind in weights:
            for evaluator in setup.evaluators:
                metrics |= evaluator.metrics(kind, counts[kind][evaluator.name])
        not_finite = [
            f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
        ]
        if not_finite:
            raise PredictionsError(
                f"the network's predictions are not finite: {', '.join(not_finite)}"
            )
        metrics["count"] = len(setup.eval_source)
        for kind in weights:
            texts = (evaluator.log_text(kind, metrics) for evaluator in setup.evaluators)
            logging.info("%s", " | ".join([f"{kind} weights", *filter(None, texts)]))
        return Evaluation(metrics, counts, predictions, seconds)


@contextlib.contextmanager
def open_eval_loop(setup: EvalSetup) -> Iterator[EvalLoop]:
    """Yield the loop of evaluations outside of a training run, with a watchdog of their own."""
    with Watchdog(setup.config.distributed) as watchdog, EvalLoop(setup, watchdog) as eval_loop:
        yield eval_loop


def make_eval_step(
    model: nn.Module,
    evaluators: Sequence[Evaluator],
    *,
    mesh: Mesh,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    per_image: Callable[[jax.Array, dict], dict[str, jax.Array]] | None = None,
) -> jax.stages.Wrapped:
    """Build the jitted function (weights, batch) -> (sums over the batch, values of each image).

    Args:
      model: the network.
      evaluators: give the sums.
      mesh: the devices, over axis "data".
      mean, std: normalisation of the images, on the 0..1 scale.
      per_image: function of (logits, batch) that gives {name: [B, ...]}.

    Returns:
      A function of {kind: variables}, replicated, and a batch {"image": [B, H, W, C] of values
      0..255, "label": [B], "mask": [B], 0 where a row is padding, and the evaluators' fields},
      sharded over the devices. It gives {"count": images, kind: {evaluator's name: its counts}},
      summed over all devices, and {kind: what ``per_image`` gives of the global batch}, whole on
      all of them; {} without ``per_image``.
    """

    def device_step(weights, batch):
        images = normalize(batch["image"], mean, std, model.dtype)
        counts: dict[str, Any] = {"count": jnp.sum(batch["mask"] > 0, dtype=jnp.int32)}
        rows = {}
        for kind, variables in weights.items():
            logits: Any = model.apply(variables, images, train=False)
            counts[kind] = {e.name: e.counts(logits, batch) for e in evaluators}
            if per_image:
                rows[kind] = per_image(logits, batch)
        return jax.lax.psum(counts, DATA_AXIS), rows

    step = jax.shard_map(
        device_step,
        mesh=mesh,
        in_specs=(REPLICATED, SHARDED),
        out_specs=(REPLICATED, SHARDED),
    )
    return jax.jit(step, out_shardings=NamedSharding(mesh, REPLICATED))


def sum_counts(
    eval_step: Callable[[dict, dict], tuple[dict, dict]],
    weights: dict[str, dict],
    batches: Iterable[dict],
    *,
    total: int,
    after_batch: Callable[[], None],
    keep: Callable[[dict], None] | None = None,
) -> dict[str, dict]:
    """Sum the counts of ``eval_step`` over one pass, logging the progress.

    Args:
      eval_step: from ``make_eval_step``.
      weights: {kind: variables}, replicated.
      batches: the batches of the pass, on the devices.
      total: images in the split.
      after_batch: called after each batch.
      keep: called with the values of each batch's images.

    Raises:
      RuntimeError: the pass did not count ``total`` images.
    """
    sums = None
    start = last_line = time.monotonic()
    for batch in batches:
        counts, rows = eval_step(weights, batch)
        if sums is None:
            # Other processes may compile for longer: wait here, where the watchdog allows that.
            sums = jax.block_until_ready(counts)
        else:
            # With one batch at work and one on its way the devices are never idle, and memory
            # holds no more of them.
            jax.block_until_ready(sums)
            sums = jax.tree.map(jnp.add, sums, counts)
        if keep:
            keep(rows)
        if time.monotonic() >= last_line + SECONDS_BETWEEN_LINES:
            done = int(sums["count"])
            seconds = time.monotonic() - start
            logging.info(
                "evaluating %d/%d | %.4g img/s | %s left",
                done,
                total,
                done / seconds,
                format_duration(seconds / max(done, 1) * (total - done)),
            )
            last_line = time.monotonic()
        after_batch()
    sums = jax.device_get(sums)
    if sums["count"] != total:
        raise RuntimeError(f"the evaluation counted {sums['count']} images of {total}")
    return sums


def _check_classes(variables: dict, setup: EvalSetup) -> None:
    head = variables["params"].get("head")
    classes = head["kernel"].shape[-1] if head else 0
    if classes != setup.model.num_classes:
        raise ValueError(
            f"the weights have {classes} classes, but {setup.config.data.name!r} has "
            f"{setup.model.num_classes}; evaluate them on the data that they were trained for, or "
            "fine-tune them, which gives them a new classifier: "
            f"{command_line.command('train')} --config=finetune --weights=PATH"
        )
