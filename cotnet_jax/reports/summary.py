"""What a report says, as numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cotnet_jax.data import class_names
from cotnet_jax.data.file_names import as_text
from cotnet_jax.training.evaluate import Evaluation, FoundWeights
from cotnet_jax.training.predictions import Predictions
from cotnet_jax.training.setup import EvalSetup


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """How one class fares.

    Attributes:
      name: its name.
      images: that have this label.
      accuracy: share of them that are classified as it (recall), 0..1; None without any.
      predicted: images that are classified as it.
      precision: share of those that have this label, 0..1; None without any.
    """

    name: str
    images: int
    accuracy: float | None
    predicted: int
    precision: float | None


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that are taken for another.

    Attributes:
      label, prediction: indices of the two classes.
      images: how many.
      share: of the label's images, 0..1.
    """

    label: int
    prediction: int
    images: int
    share: float


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Images whose confidence lies above ``low`` and up to ``high``.

    Attributes:
      low, high: the edges, 0..1.
      images: how many.
      accuracy: share of them that are right, 0..1; None without any.
      confidence: their mean confidence, 0..1; None without any.
    """

    low: float
    high: float
    images: int
    accuracy: float | None
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is written of one kind of weights on one split.

    Attributes:
      about: model, weights, step, kind, dataset, split, image_size, images, seconds.
      metrics: in percent, but for the loss: top1, top5, loss, class_accuracy, ece, ...; those of
        the other kind of weights, where it was evaluated too, with its name before.
      names: [classes], of the classes in the order of the logits.
      counts: int [classes, classes], images by label (row) and top class (column).
      classes: [classes], how each class fares.
      confusions: all there are, the most frequent first.
      bins: of the calibration.
      predictions: of all images.
    """

    about: dict[str, Any]
    metrics: dict[str, float]
    names: tuple[str, ...]
    counts: np.ndarray
    classes: tuple[ClassFigures, ...]
    confusions: tuple[ConfusedPair, ...]
    bins: tuple[CalibrationBin, ...]
    predictions: Predictions


def summarize(setup: EvalSetup, found: FoundWeights, evaluation: Evaluation) -> Report:
    """Return the report of the last kind of the weights that were found and evaluated.

    Args:
      setup: made with report=True.
      found: the weights.
      evaluation: what ``EvalLoop.evaluate`` gave for them.
    """
    key = list(found.variables)[-1]
    counts = evaluation.counts[key]
    data = setup.config.data
    names = readable_names(setup.eval_source.class_names)
    return Report(
        about={
            "model": setup.config.model.name,
            "weights": found.path,
            "step": found.step,
            "kind": found.kind,
            "dataset": data.name,
            "split": data.eval_split,
            "image_size": data.image_size,
            "images": int(evaluation.metrics["count"]),
            "seconds": round(evaluation.seconds, 1),
        },
        metrics={
            name.removeprefix(f"{key}_"): value
            for name, value in evaluation.metrics.items()
            if name != "count"
        },
        names=names,
        counts=counts["confusion"]["images"],
        classes=class_figures(counts["confusion"]["images"], names),
        confusions=find_confusions(counts["confusion"]["images"]),
        bins=calibration_bins(**counts["calibration"]),
        predictions=evaluation.predictions[key],
    )


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names to show: ImageNet's words in place of its WordNet ids."""
    if tuple(names) == class_names.imagenet_wnids():
        return class_names.imagenet_names()
    return tuple(map(as_text, names))


def class_figures(counts: np.ndarray, names: Sequence[str]) -> tuple[ClassFigures, ...]:
    """Return how each class fares.

    Args:
      counts: int [classes, classes], images by label (row) and top class (column).
      names: [classes].
    """
    return tuple(
        ClassFigures(
            name=name,
            images=int(images),
            accuracy=_share(right, images),
            predicted=int(predicted),
            precision=_share(right, predicted),
        )
        for name, right, images, predicted in zip(
            names, counts.diagonal(), counts.sum(1), counts.sum(0), strict=True
        )
    )


def find_confusions(counts: np.ndarray) -> tuple[ConfusedPair, ...]:
    """Return every pair of classes that is confused, the most frequent first.

    Of equally frequent ones that of the larger share of its label's images comes first.
    """
    wrong = counts - np.diag(counts.diagonal())
    labels, predictions = wrong.nonzero()
    images = wrong[labels, predictions]
    shares = images / counts.sum(1)[labels]
    order = np.lexsort((-shares, -images))
    return tuple(
        ConfusedPair(int(labels[i]), int(predictions[i]), int(images[i]), float(shares[i]))
        for i in order
    )


def calibration_bins(
    images: np.ndarray, right: np.ndarray, confidence: np.ndarray
) -> tuple[CalibrationBin, ...]:
    """Return the bins of ``calibration_counts``, summed over a split: [M] each."""
    edges = np.linspace(0, 1, len(images) + 1)
    return tuple(
        CalibrationBin(
            low=float(low),
            high=float(high),
            images=int(count),
            accuracy=_share(r, count),
            confidence=_share(c, count),
        )
        for low, high, count, r, c in zip(edges, edges[1:], images, right, confidence, strict=False)
    )


def _share(part: float, whole: int) -> float | None:
    return float(part / whole) if whole else None
