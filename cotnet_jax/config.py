"""Check the values of a configuration, one line for each that cannot be used."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from cotnet_jax import files
from cotnet_jax.data import randaugment
from cotnet_jax.data.transforms import MAX_PIXELS
from cotnet_jax.models import parameter_names
from cotnet_jax.models.variants import get_variant


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a field may have.

    Attributes:
      message: what a value must be, to follow "must be".
      contains: whether a value is one of them; NaN never is.
    """

    message: str
    contains: Callable[[Any], bool]


def at_least(low: float) -> Range:
    return Range(f"{low} or more", lambda value: low <= value < math.inf)


def between(low: float, high: float) -> Range:
    return Range(f"from {low} to {high}", lambda value: low <= value <= high)


def from_to_below(low: float, high: float) -> Range:
    return Range(f"from {low} to below {high}", lambda value: low <= value < high)


def above(low: float, at_most: float) -> Range:
    return Range(f"above {low} and at most {at_most}", lambda value: low < value <= at_most)


def one_of(*choices: str | int) -> Range:
    *others, last = (json.dumps(choice) for choice in choices)
    return Range(f"{', '.join(others)} or {last}", lambda value: value in choices)


def fraction_pair() -> Range:
    return Range(
        "two fractions, the smaller first, above 0 and at most 1",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    )


def positive_pair() -> Range:
    return Range(
        "two numbers above 0, the smaller first",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] < math.inf,
    )


def three_numbers() -> Range:
    return Range("three numbers", lambda value: len(value) == 3 and all(map(math.isfinite, value)))


def three_positive_numbers() -> Range:
    return Range(
        "three numbers above 0",
        lambda value: len(value) == 3 and all(0 < number < math.inf for number in value),
    )


def names_in(text: str) -> list[str]:
    """Return the names in a field that lists them, such as "epochs,schedule"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def names_of(*choices: str) -> Range:
    return Range(
        f'some of {", ".join(choices)}, with commas between them, or ""',
        lambda value: set(names_in(value)) <= set(choices),
    )


RANGES = {
    "seed": between(0, 2**32 - 1),
    "epochs": at_least(1),
    "steps": at_least(0),
    "steps_per_eval": at_least(0),
    "accumulate_steps": at_least(1),
    "init_kind": one_of("ema", "raw", ""),
    "model.drop_rate": from_to_below(0, 1),
    "model.drop_path_rate": from_to_below(0, 1),
    "model.output_stride": one_of(8, 16, 32),
    "model.dtype": one_of("auto", "float32", "bfloat16"),
    "finetune.layer_decay": above(0, at_most=1),
    "finetune.head_only_epochs": at_least(0),
    "finetune.head_only_steps": at_least(0),
    "data.name": Range(
        "the path of a prepared folder (cotnet-prepare folder), or the name of a dataset", bool
    ),
    "data.image_size": at_least(1),
    "data.crop": above(0, at_most=1),
    "data.interpolation": one_of("bicubic", "bilinear"),
    "data.mean": three_numbers(),
    "data.std": three_positive_numbers(),
    "data.num_threads": at_least(0),
    "data.num_workers": at_least(-1),
    "data.prefetch": at_least(1),
    "data.max_undecodable": between(0, 1),
    "data.max_pixels": between(1, MAX_PIXELS),
    "augment.scale": fraction_pair(),
    "augment.ratio": positive_pair(),
    "augment.flip": between(0, 1),
    "augment.randaugment_on": one_of("host", "device"),
    "augment.color_jitter": at_least(0),
    "augment.erasing_probability": between(0, 1),
    "augment.erasing_mode": one_of("pixel", "const"),
    "augment.erasing_area": fraction_pair(),
    "augment.erasing_ratio": positive_pair(),
    "mixing.probability": between(0, 1),
    "mixing.cutmix_probability": between(0, 1),
    "mixing.mixup_alpha": at_least(0),
    "mixing.cutmix_alpha": at_least(0),
    "mixing.label_smoothing": between(0, 1),
    "loss.class_weights": one_of("balanced", ""),
    "optimizer.name": one_of("sgd", "adamw"),
    "optimizer.weight_decay": at_least(0),
    "optimizer.momentum": from_to_below(0, 1),
    "optimizer.beta1": from_to_below(0, 1),
    "optimizer.beta2": from_to_below(0, 1),
    "optimizer.epsilon": above(0, at_most=1),
    "optimizer.clip_norm": at_least(0),
    "schedule.peak": at_least(0),
    "schedule.unit": one_of("epoch", "step"),
    "schedule.warmup_epochs": at_least(0),
    "schedule.warmup_steps": at_least(0),
    "schedule.warmup_start": at_least(0),
    "schedule.final": at_least(0),
    "schedule.base_batch_size": at_least(0),
    "ema.decay": from_to_below(0, 1),
    "eval.every_epochs": at_least(1),
    "eval.calibration_bins": at_least(1),
    "early_stopping.patience": at_least(1),
    "checkpoint.every_steps": at_least(0),
    "checkpoint.keep_best": at_least(0),
    "profile.steps": at_least(0),
    "profile.first_step": at_least(1),
    "distributed.timeout_seconds": at_least(10),
    "distributed.slow_timeout_seconds": at_least(10),
    "log.writers": names_of("wandb", "trackio"),
    "log.extras": names_of("step_time", "mfu", "memory", "gradient_norms", "images", "all"),
    "log_every_steps": at_least(1),
}


# Fields that name a file or a folder; "" is none.
PATHS = ("init_from", "data.name", "data.data_dir", "eval.real_labels")
# Names of datasets, whatever folder there may be of that name.
_BUILT_IN_DATASETS = ("digits", "synthetic")


def expand_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return a copy whose paths are absolute, as ``files.expand`` makes them.

    Raises:
      ValueError: a path cannot be one; names the field.
    """
    config = config.copy_and_resolve_references()
    fields = flatten(config)
    for field in PATHS:
        if field in fields:
            with config.unlocked():
                config.update_from_flattened_dict({field: expand_path(field, fields[field])})
    return config


def expand_path(field: str, value: str) -> str:
    """Return the value of one of ``PATHS`` with its path absolute.

    Raises:
      ValueError: it cannot be a path.
    """
    if not value or (field == "data.name" and not _is_folder(value)):
        return value
    try:
        return files.expand(value)
    except ValueError as error:
        raise ValueError(f"--config.{field}={value}: {error}") from None


def _is_folder(dataset: str) -> bool:
    if dataset in _BUILT_IN_DATASETS or files.is_url(dataset):
        return False
    return dataset.startswith((".", "/", "~")) or os.path.isdir(dataset)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.field": value} of a configuration, ConfigDict or parsed JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten(value, f"{name}.")
            if isinstance(value, Mapping | ml_collections.ConfigDict)
            else {name: value}
        )
    return flat


def restore(default: ml_collections.ConfigDict, saved: Mapping[str, Any]):
    """Return a copy of ``default`` with the values that a configuration saved as JSON has.

    Fields that only one of them has are of another version of this package: those of ``default``
    stay, others are left out.

    Args:
      default: as in configs/default.py.
      saved: parsed from JSON.

    Raises:
      ValueError: lists every field whose value is of another type.
    """
    config = default.copy_and_resolve_references()
    known = flatten(config)
    problems = []
    for field, value in flatten(saved).items():
        if field in known:
            try:
                config.update_from_flattened_dict({field: value})
            except (TypeError, ValueError):
                problems.append(f"{field} = {value!r}: must be {type(known[field]).__name__}")
    if problems:
        raise ValueError("fields of another type:\n  " + "\n  ".join(problems))
    return config


def weight_kinds(config: Mapping[str, Any]) -> tuple[Literal["raw", "ema"], ...]:
    """Return the kinds of weights of a run; its checkpoints are ranked by the last one's top-1."""
    return ("raw", "ema") if config["ema"]["decay"] else ("raw",)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise ValueError with all problems of a configuration, if there are any."""
    if problems:
        raise ValueError("\n  ".join(["the configuration has problems:", *problems]))


def find_problems(
    config: ml_collections.ConfigDict, devices: int, *, training: bool = True
) -> list[str]:
    """Return a line for every field that cannot be used, with what to type instead.

    Args:
      config: as in configs/default.py.
      devices: number of devices that a batch is sharded over.
      training: False skips what only a training step needs.
    """
    problems = [*out_of_range(config, RANGES), *_unknown_names(config)]
    if training:
        problems += _train_step_problems(config, devices)
    if config.eval.batch_size < 1 or config.eval.batch_size % devices:
        wanted = f"a positive multiple of the {devices} devices"
        problems.append(_line(config, "eval.batch_size", wanted))
    return problems


def out_of_range(config: Mapping[str, Any], fields: Iterable[str]) -> Iterator[str]:
    """Yield a line for each of ``fields``, such as "data.crop", that is out of its own range."""
    for field in fields:
        if not RANGES[field].contains(_value(config, field)):
            yield _line(config, field, RANGES[field].message)


def _unknown_names(config) -> Iterator[str]:
    try:
        get_variant(config.model.name)
    except ValueError as error:
        yield f"--config.model.name: {error}"
    try:
        randaugment.parse(config.augment.randaugment)
    except ValueError as error:
        yield f"--{error}"
    known = flatten(config)
    sections = {name.rpartition(".")[0] for name in known}
    for name in allowed_changes(config):
        if name not in known and name not in sections and name != "all":
            wanted = 'fields or sections such as "epochs,schedule", or "all"'
            yield f"--config.resume.allow_changes={name}: no such field; must be {wanted}"


def allowed_changes(config: Mapping[str, Any]) -> list[str]:
    """Return the fields and sections that config.resume.allow_changes lists."""
    return names_in(flatten(config).get("resume.allow_changes") or "")


def find_length_problems(
    config: ml_collections.ConfigDict, steps_per_epoch: int | None = None
) -> list[str]:
    """Return a line for each phase at the beginning of a run that the run is too short for.

    Args:
      config: as in configs/default.py.
      steps_per_epoch: where it is not known yet, a phase in steps and a run in epochs, or the other
        way round, are not compared.
    """
    run_field = "steps" if config.steps > 0 else "epochs"
    problems = []
    for phase, at_most, otherwise in (
        ("schedule.warmup", True, "the learning rate never reaches its peak"),
        ("finetune.head_only", False, "the rest is never trained (--config.finetune.freeze)"),
    ):
        unit = "steps" if _value(config, f"{phase}_steps") > 0 else "epochs"
        field = f"{phase}_{unit}"
        length, run = _value(config, field), config[run_field]
        run_text = f"the run's --config.{run_field}={run}"
        if unit != run_field:
            if steps_per_epoch is None:
                continue
            length *= steps_per_epoch if unit == "epochs" else 1
            run *= steps_per_epoch if run_field == "epochs" else 1
            run_text += f" (an epoch is {steps_per_epoch} steps)"
        too_long = length > run if at_most else length >= run
        if too_long and length > 0 and run > 0:
            limit = "at most" if at_most else "less than"
            problems.append(_line(config, field, f"{limit} {run_text}, or {otherwise}"))
    return problems


def _finetune_problems(config) -> Iterator[str]:
    finetune = config.finetune
    for field, parse in (
        ("freeze", parameter_names.check_pattern),
        ("rate_multipliers", parameter_names.parse_multipliers),
    ):
        try:
            if finetune[field]:
                parse(finetune[field])
        except ValueError as error:
            yield f"--config.finetune.{field}={finetune[field]}: {error}"
            return
    # On noise a configuration is tried, or its speed measured.
    if config.init_from or config.data.fake:
        return
    for field, off, why in (
        ("model.freeze_batch_norm", "False", "random ones have no statistics"),
        ("finetune.new_head", "False", "give some by --weights=PATH"),
        ("finetune.freeze", '""', "give some by --weights=PATH"),
        ("finetune.head_only_epochs", "0", "give some by --weights=PATH"),
        ("finetune.head_only_steps", "0", "give some by --weights=PATH"),
    ):
        value = _value(config, field)
        if value and (field not in RANGES or RANGES[field].contains(value)):
            yield _line(config, field, f"{off} where --config.init_from names no weights: {why}")


def metrics_of_evaluation(config: ml_collections.ConfigDict) -> list[str]:
    """Return the names that ``early_stopping.metric`` may have."""
    names = ("top1", "top5", "loss", *(("real_top1",) if config.eval.real_labels else ()))
    return [f"{kind}_{name}" for kind in weight_kinds(config) for name in names]


def _train_step_problems(config, devices) -> Iterator[str]:
    yield from _finetune_problems(config)
    yield from find_length_problems(config)
    if config.schedule.warmup_steps > 0 and config.schedule.unit == "epoch":
        yield _line(config, "schedule.warmup_steps", '0, or --config.schedule.unit="step"')
    if config.loss.class_weights and config.data.balanced_sampling:
        wanted = '"", or --config.data.balanced_sampling=False: each balances the classes by itself'
        yield _line(config, "loss.class_weights", wanted)
    if (
        config.augment.randaugment
        and config.augment.randaugment_on == "device"
        and config.augment.erasing_probability > 0
    ):
        wanted = '0, or --config.augment.randaugment_on="host": the host erases, after RandAugment'
        yield _line(config, "augment.erasing_probability", wanted)
    metrics = metrics_of_evaluation(config)
    if config.early_stopping.metric not in ("", *metrics):
        yield _line(config, "early_stopping.metric", one_of(*metrics, "").message)
    parts = devices * max(config.accumulate_steps, 1)
    if config.batch_size < 1 or config.batch_size % parts:
        wanted = (
            f"a positive multiple of {parts} ({devices} devices x {config.accumulate_steps} "
            "accumulate_steps)"
        )
        yield _line(config, "batch_size", wanted)
    elif config.batch_size == parts and not (
        config.model.sync_batch_norm or config.model.freeze_batch_norm
    ):
        wanted = (
            f"{2 * parts} or more, so that every device has two images for its batch norm "
            "(or --config.model.sync_batch_norm=True)"
        )
        yield _line(config, "batch_size", wanted)


def _line(config, field: str, wanted: str) -> str:
    return f"--config.{field}={_value(config, field)}: must be {wanted}"


def _value(config, field: str):
    for key in field.split("."):
        config = config[key]
    return config
