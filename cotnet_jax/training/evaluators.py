"""What an evaluation measures: a list of evaluators, each scoring the same logits.

To add one, write a class with the methods of :class:`Evaluator` and an entry in ``_EVALUATORS``, or
in ``_REPORT_EVALUATORS`` if only a report needs it.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import ml_collections
import numpy as np

from cotnet_jax.data import imagenet
from cotnet_jax.data.examples import ExampleFields
from cotnet_jax.data.real_labels import read_real_labels, real_labels_of
from cotnet_jax.data.sources import Source
from cotnet_jax.data.undecodable import Batch
from cotnet_jax.training.metrics import (
    calibration_counts,
    confusion_counts,
    evaluation_counts,
    expected_calibration_error,
    mean_class_accuracy,
    real_label_counts,
)


class Evaluator(Protocol):
    """One way to score logits.

    Attributes:
      name: unique among the evaluators.
      example_fields: entries that it needs in a batch besides image, label and mask, as for
        ``pipeline.eval_batches``. The functions are sent to the workers that read images, so
        they must be in a module that does not import JAX.
    """

    name: str
    example_fields: ExampleFields

    def check_source(self, config: ml_collections.ConfigDict, source: Source) -> None:
        """Raise ValueError if the evaluation split has no such scores."""

    def counts(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return sums over a batch, arrays that add up over batches and devices.

        Args:
          logits: [B, classes].
          batch: "image", "label", "mask" (0 for padding) and ``example_fields``, [B, ...].
        """

    def metrics(self, kind: str, counts: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the metrics of a whole split, such as {KIND_top1}, from its summed counts."""

    def log_text(self, kind: str, metrics: dict[str, float]) -> str:
        """Return the part of the evaluation's log line; "" where there is nothing to report."""


class Accuracy:
    """Top-1 and top-5 accuracy in percent, and the mean cross entropy in nats."""

    name = "accuracy"

    def __init__(self):
        self.example_fields: ExampleFields = {}

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Accuracy":
        del config
        return cls()

    def check_source(self, config, source):
        pass

    def counts(self, logits, batch):
        return evaluation_counts(logits, batch["label"], batch["mask"])

    def metrics(self, kind, counts):
        images = int(counts["count"])
        return {
            f"{kind}_top1": 100 * float(counts["top1"]) / images,
            f"{kind}_top5": 100 * float(counts["top5"]) / images,
            f"{kind}_loss": float(counts["loss"]) / images,
        }

    def log_text(self, kind, metrics):
        return (
            f"top-1 {metrics[f'{kind}_top1']:.2f} % | top-5 {metrics[f'{kind}_top5']:.2f} % | "
            f"loss {metrics[f'{kind}_loss']:.4f} | {metrics['count']} images"
        )


class RealLabels:
    """Top-1 accuracy by ReaL labels, in percent of the images that have one.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159.

    Args:
      table: from ``read_real_labels``.
    """

    name = "real_labels"

    def __init__(self, table: np.ndarray):
        real = functools.partial(real_labels_of, table=table)
        self.example_fields: ExampleFields = {"real": real}

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "RealLabels | None":
        if not config.eval.real_labels:
            return None
        try:
            return cls(read_real_labels(config.eval.real_labels))
        except ValueError as error:
            raise ValueError(f"--config.eval.real_labels={error}") from None

    def check_source(self, config, source):
        name = source[0]["file_name"]
        if source.num_classes != imagenet.NUM_CLASSES or not imagenet.validation_number(name):
            raise ValueError(
                f"--config.eval.real_labels={config.eval.real_labels}: these labels are for "
                "ImageNet's validation images, which are recognised by their names, such as "
                f"{imagenet.validation_name(293)}; the first of {config.data.name!r} "
                f"{config.data.eval_split!r} is named {name!r}, one of {source.num_classes} classes"
            )

    def counts(self, logits, batch):
        return real_label_counts(logits, batch["real"], batch["mask"])

    def metrics(self, kind, counts):
        images = int(counts["real_count"])
        if not images:
            return {}
        return {
            "real_count": images,
            f"{kind}_real_top1": 100 * float(counts["real_top1"]) / images,
        }

    def log_text(self, kind, metrics):
        if "real_count" not in metrics:
            return ""
        return f"ReaL top-1 {metrics[f'{kind}_real_top1']:.2f} % of {metrics['real_count']}"


class Confusion:
    """Images of each label by their top class, and the mean accuracy of the classes in percent.

    Takes 4 bytes for each pair of classes on every device: 4 MB for 1,000.
    """

    name = "confusion"

    def __init__(self):
        self.example_fields: ExampleFields = {}

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Confusion":
        del config
        return cls()

    def check_source(self, config, source):
        pass

    def counts(self, logits, batch):
        return confusion_counts(logits, batch["label"], batch["mask"])

    def metrics(self, kind, counts):
        return {f"{kind}_class_accuracy": 100 * mean_class_accuracy(counts["images"])}

    def log_text(self, kind, metrics):
        return f"mean of classes {metrics[f'{kind}_class_accuracy']:.2f} %"


class Calibration:
    """Expected calibration error (ECE) in percent.

    Args:
      bins: of the confidences, as in ``calibration_counts``.
    """

    name = "calibration"

    def __init__(self, bins: int):
        self.bins = bins
        self.example_fields: ExampleFields = {}

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Calibration":
        return cls(config.eval.calibration_bins)

    def check_source(self, config, source):
        pass

    def counts(self, logits, batch):
        return calibration_counts(logits, batch["label"], batch["mask"], self.bins)

    def metrics(self, kind, counts):
        return {f"{kind}_ece": 100 * expected_calibration_error(**counts)}

    def log_text(self, kind, metrics):
        return f"ECE {metrics[f'{kind}_ece']:.2f} %"


# Each makes an evaluator from the configuration, or None where it is off; a ValueError's message
# is the line for a field that cannot be used.
_EVALUATORS: tuple[Callable[[ml_collections.ConfigDict], Evaluator | None], ...] = (
    Accuracy.from_config,
    RealLabels.from_config,
)
# In addition, for a report.
_REPORT_EVALUATORS: tuple[Callable[[ml_collections.ConfigDict], Evaluator], ...] = (
    Confusion.from_config,
    Calibration.from_config,
)


def make_evaluators(
    config: ml_collections.ConfigDict, *, report: bool = False
) -> tuple[tuple[Evaluator, ...], list[str]]:
    """Return the evaluators that a configuration asks for, and a line for each that fails.

    Args:
      config: the whole configuration.
      report: add those that only a report needs.
    """
    evaluators, problems = [], []
    for from_config in (*_EVALUATORS, *(_REPORT_EVALUATORS if report else ())):
        try:
            evaluator = from_config(config)
        except ValueError as error:
            problems.append(str(error))
        else:
            if evaluator is not None:
                evaluators.append(evaluator)
    return tuple(evaluators), problems
