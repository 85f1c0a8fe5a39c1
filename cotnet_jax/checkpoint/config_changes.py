"""What may differ between the configuration of a run and the one that resumes it."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from cotnet_jax.config import PATHS, allowed_changes, expand_path, flatten


class Change(enum.Enum):
    """What a change of a field does to a run.

    Attributes:
      FREE: it changes nothing of what is trained.
      MEANING: it changes the order of the data or the meaning of a step, so that what comes out
        is neither the one run nor the other.
      IDENTITY: the weights are of another network, or learned from other images; evaluating is
        refused too.
    """

    FREE = "free"
    MEANING = "meaning"
    IDENTITY = "identity"


# Every field of configs/default.py; a name without a dot is a whole section or a single field.
# The longest name that fits counts.
CLASSES: Mapping[str, Change] = {
    "seed": Change.MEANING,
    # The learning rates follow a cosine over all epochs.
    "epochs": Change.MEANING,
    "steps": Change.MEANING,
    "steps_per_eval": Change.FREE,
    "batch_size": Change.MEANING,
    # The batch statistics are those of one part.
    "accumulate_steps": Change.MEANING,
    # Read before the first step only.
    "init_from": Change.FREE,
    "init_kind": Change.FREE,
    "accept_classes": Change.FREE,
    "model": Change.MEANING,
    "model.name": Change.IDENTITY,
    "finetune": Change.MEANING,
    # Read before the first step only.
    "finetune.new_head": Change.FREE,
    "data.name": Change.IDENTITY,
    "data.fake": Change.IDENTITY,
    "data.data_dir": Change.FREE,
    "data.train_split": Change.IDENTITY,
    "data.eval_split": Change.FREE,
    "data.image_size": Change.MEANING,
    # Of evaluation alone.
    "data.crop": Change.FREE,
    "data.interpolation": Change.MEANING,
    "data.mean": Change.MEANING,
    "data.std": Change.MEANING,
    "data.scaled_decoding": Change.MEANING,
    "data.balanced_sampling": Change.MEANING,
    # The batches are the same for any number of threads and processes.
    "data.num_threads": Change.FREE,
    "data.num_workers": Change.FREE,
    "data.prefetch": Change.FREE,
    "data.max_undecodable": Change.FREE,
    # Which images are replaced, and how those of phones lie.
    "data.max_pixels": Change.MEANING,
    "data.exif_orientation": Change.MEANING,
    "augment": Change.MEANING,
    "mixing": Change.MEANING,
    "loss": Change.MEANING,
    "optimizer": Change.MEANING,
    "schedule": Change.MEANING,
    "ema": Change.MEANING,
    "eval": Change.FREE,
    # When the run ends, as the interval of evaluations does; its steps are the same.
    "early_stopping": Change.FREE,
    "checkpoint": Change.FREE,
    "resume": Change.FREE,
    "profile": Change.FREE,
    "distributed": Change.FREE,
    "log": Change.FREE,
    "log_every_steps": Change.FREE,
    "notes": Change.FREE,
}

# The field that a changed number of training images is reported as.
IMAGES = "data.train_split"

# Fields that runs of earlier versions do not have, and what those runs did.
_BEFORE: Mapping[str, Any] = {"augment.randaugment_on": "host", "data.scaled_decoding": False}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field with another value than in the run that is resumed.

    Attributes:
      field: its name, such as "schedule.peak".
      before, now: its values, as JSON has them.
      allowed: whether the run may be resumed with it.
    """

    field: str
    before: Any
    now: Any
    allowed: bool

    def __str__(self) -> str:
        return f"--config.{self.field}: {self.before!r} there, {self.now!r} here"


def change_of(field: str) -> Change:
    """Return the class of a field; a field that no table knows is of the run's meaning."""
    name = field
    while name not in CLASSES and "." in name:
        name = name.rpartition(".")[0]
    return CLASSES.get(name, Change.MEANING)


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Compare two configurations, parsed from JSON.

    A field that only one of them has is of another version of this package, and counts as equal,
    unless it is known what earlier versions did.
    """
    earlier, current = {**_BEFORE, **flatten(before)}, flatten(now)
    differences = []
    for field, value in current.items():
        if field not in earlier or field == "resume.allow_changes":
            continue
        old, new = (_comparable(field, each) for each in (earlier[field], value))
        if old != new:
            free = change_of(field) is Change.FREE
            allowed = free or _is_listed(field, now)
            differences.append(Difference(field, earlier[field], value, allowed))
    return differences


def compare_images(before: int, now: int, config: Mapping[str, Any]) -> list[Difference]:
    """Compare the numbers of training images, which decide their order and the length of epochs.

    Args:
      config: the one that resumes, parsed from JSON.
    """
    if before == now:
        return []
    field, (there, here) = IMAGES, (f"{number:,} images" for number in (before, now))
    return [Difference(field, there, here, _is_listed(field, config))]


def _is_listed(field: str, config: Mapping[str, Any]) -> bool:
    allowed = allowed_changes(config)
    return any(name in ("all", field) or field.startswith(f"{name}.") for name in allowed)


def _comparable(field: str, value: Any) -> Any:
    """Return a value in the form in which equal ones are equal."""
    if field in PATHS and isinstance(value, str):
        try:
            # Earlier versions kept paths as they were typed.
            return expand_path(field, value)
        except ValueError:
            return value
    return value
