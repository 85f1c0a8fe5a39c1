"""Accuracy over a whole split, every image counted once."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from jax.sharding import Mesh

from cotnet_jax.checkpoint.checkpointer import open_checkpoints, weight_kinds
from cotnet_jax.checkpoint.workdir import check_workdir
from cotnet_jax.data.normalize import normalize
from cotnet_jax.distributed import sharding
from cotnet_jax.distributed.sharding import AXIS, REPLICATED, SPLIT, prefetch_to_device
from cotnet_jax.distributed.watchdog import Watchdog
from cotnet_jax.training.metrics import evaluation_counts, real_label_counts
from cotnet_jax.training.progress import format_duration
from cotnet_jax.training.setup import EvalSetup, set_up_evaluation
from cotnet_jax.weights import read_weights

SECONDS_BETWEEN_LINES = 10.0


def evaluate_only(
    config: ml_collections.ConfigDict, workdir: str | Path | None
) -> dict[str, float]:
    """Evaluates config.init_from, or else the best checkpoint of the run in workdir.

    Returns:
      Figures as of ``evaluate``: of "raw" and "ema" weights for a run, of "given" ones otherwise.

    Raises:
      ValueError, FileNotFoundError: there are no such weights, or they are of another model.
      CheckpointError: the run has no checkpoint that can be read.
    """
    experiment = set_up_evaluation(config)
    if config.init_from:
        kind = config.init_kind or None
        read = read_weights(config.init_from, kind, config.model.name)
        for note in read.notes:
            logging.info("%s", note)
        named = {"given": read.variables}
    else:
        check_workdir(workdir, config)
        with open_checkpoints(workdir, config, read_only=True) as checkpointer:
            step = "latest" if checkpointer.best_step() is None else "best"
            kinds = weight_kinds(config)
            named = {kind: checkpointer.restore_weights(step, kind) for kind in kinds}
    for variables in named.values():
        _check_classes(variables, experiment)
    with Watchdog(config.distributed) as watchdog, evaluating(experiment, watchdog) as evaluate_all:
        return evaluate_all(named)


@contextlib.contextmanager
def evaluating(
    experiment: EvalSetup, watchdog: Watchdog
) -> Iterator[Callable[..., dict[str, float]]]:
    """The function {name: variables} -> metrics of one pass, which it also logs.

    What reads the images is started by the first call, serves all, and ends with the context.
    ``watchdog`` and the function's ``after_batch`` are those of :func:`evaluate`.
    """
    config, mesh = experiment.config, experiment.mesh
    eval_step = make_eval_step(
        experiment.model, mesh=mesh, mean=config.data.mean, std=config.data.std
    )

    def evaluate_all(variables, after_batch=lambda: None):
        metrics = evaluate(
            eval_step,
            sharding.replicate(mesh, variables),
            itertools.islice(batches, experiment.steps_per_pass),
            mesh=mesh,
            total=len(experiment.eval_source),
            watchdog=watchdog,
            after_batch=after_batch,
        )
        for name in variables:
            logging.info(
                "%s weights | top-1 %.2f %% | top-5 %.2f %% | loss %.4f | %d images%s",
                name,
                metrics[f"{name}_top1"],
                metrics[f"{name}_top5"],
                metrics[f"{name}_loss"],
                metrics["count"],
                _real_part(metrics, name),
            )
        return metrics

    with contextlib.closing(experiment.eval_batches()) as batches:
        yield evaluate_all


def make_eval_step(
    model: nn.Module, *, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[dict, dict], dict]:
    """Builds the jitted function (variables, batch) -> sums over the batch.

    Args:
      model: the network.
      mesh: the devices, over axis "data".
      mean, std: normalisation of the images, on the 0..1 scale.

    Returns:
      A function of {name: variables}, replicated, and a batch {"image": [B, H, W, C] of values
      0..255, "label": [B], "mask": [B], 0 where a row is padding}, split over the devices. It
      gives for each name the sums of ``metrics.evaluation_counts`` over all devices and, where the
      batch has "real": [B, K], those of ``metrics.real_label_counts``.
    """

    def device_step(variables, batch):
        images = normalize(batch["image"], mean, std, model.dtype)
        counts = {}
        for name, each in variables.items():
            logits = model.apply(each, images, train=False)
            counts[name] = evaluation_counts(logits, batch["label"], batch["mask"])
            if "real" in batch:
                counts[name] |= real_label_counts(logits, batch["real"], batch["mask"])
        return jax.lax.psum(counts, AXIS)

    return jax.jit(
        jax.shard_map(device_step, mesh=mesh, in_specs=(REPLICATED, SPLIT), out_specs=REPLICATED)
    )


def evaluate(
    eval_step: Callable[[dict, dict], dict],
    variables: dict[str, dict],
    batches: Iterable[dict],
    *,
    mesh: Mesh,
    total: int,
    watchdog: Watchdog,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Runs one pass and gives {NAME_top1, NAME_top5} in percent, {NAME_loss} in nats, {count}.

    With ReaL labels there are NAME_real_top1, in percent of the "real_count" images that have
    one, too.

    Args:
      eval_step: from ``make_eval_step``.
      variables: {name: {"params", "batch_stats"}}, replicated; all see each batch once.
      batches: this process's rows of one pass over a split.
      mesh: the devices that ``eval_step`` was made for.
      total: images in the split, for the progress shown.
      watchdog: the run's, over each batch.
      after_batch: called after each batch; what it raises ends the evaluation.

    Raises:
      RuntimeError: the pass did not count ``total`` images.
    """
    sums = None
    start = line_due = time.monotonic()
    line_due += SECONDS_BETWEEN_LINES
    for batch in watchdog.guard(prefetch_to_device(mesh, batches)):
        counts = eval_step(variables, batch)
        if sums is None:
            # Other processes may compile for longer, and the watchdog allows that for this batch.
            sums = jax.block_until_ready(counts)
        else:
            sums = jax.tree.map(jnp.add, sums, counts)
        if time.monotonic() >= line_due:
            done = int(next(iter(sums.values()))["count"])
            seconds = time.monotonic() - start
            logging.info(
                "evaluating %d/%d | %.4g img/s | %s left",
                done,
                total,
                done / seconds,
                format_duration(seconds / max(done, 1) * (total - done)),
            )
            line_due = time.monotonic() + SECONDS_BETWEEN_LINES
        after_batch()
    metrics = {}
    for name, each in jax.device_get(sums).items():
        count = int(each["count"])
        if count != total:
            raise RuntimeError(f"the evaluation counted {count} images of {total}")
        metrics[f"{name}_top1"] = 100 * float(each["top1"]) / count
        metrics[f"{name}_top5"] = 100 * float(each["top5"]) / count
        metrics[f"{name}_loss"] = float(each["loss"]) / count
        if each.get("real_count"):
            metrics["real_count"] = int(each["real_count"])
            metrics[f"{name}_real_top1"] = 100 * float(each["real_top1"]) / metrics["real_count"]
    return metrics | {"count": total}


def _check_classes(variables: dict, experiment: EvalSetup) -> None:
    head = variables["params"].get("head")
    classes = head["kernel"].shape[-1] if head else 0
    if classes != experiment.model.num_classes:
        data = experiment.config.data
        raise ValueError(
            f"the weights tell {classes} classes apart, but {data.name!r} has "
            f"{experiment.model.num_classes}; evaluate them on the data that they were trained "
            "for, or fine-tune them (--mode=train starts with a new classifier)"
        )


def _real_part(metrics: dict[str, float], name: str) -> str:
    if "real_count" not in metrics:
        return ""
    return f" | ReaL top-1 {metrics[f'{name}_real_top1']:.2f} % of {metrics['real_count']}"
