"""Whether the values of a configuration can be used: a line for each one that cannot."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from cotnet_jax.data import randaugment
from cotnet_jax.models.variants import get_variant

_POSITIVE = "1 or more"
_NOT_NEGATIVE = "0 or more"
_SHARE = "from 0 to 1"
_BELOW_ONE = "from 0 to below 1"

# What a field must be, in words and as a test of its value.
_RANGES = {
    _POSITIVE: lambda value: value >= 1,
    _NOT_NEGATIVE: lambda value: 0 <= value < math.inf,
    _SHARE: lambda value: 0 <= value <= 1,
    _BELOW_ONE: lambda value: 0 <= value < 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "from 0 to 4294967295": lambda value: 0 <= value < 2**32,
    "-1, 0 or more": lambda value: value >= -1,
    "two shares, the smaller first, above 0 and at most 1": lambda value: (
        len(value) == 2 and 0 < value[0] <= value[1] <= 1
    ),
    "two numbers above 0, the smaller first": lambda value: (
        len(value) == 2 and 0 < value[0] <= value[1] < math.inf
    ),
    "three numbers": lambda value: len(value) == 3 and all(map(math.isfinite, value)),
    "three numbers above 0": lambda value: len(value) == 3 and min(value) > 0,
    "10 or more": lambda value: value >= 10,
    "8, 16 or 32": lambda value: value in (8, 16, 32),
    '"auto", "float32" or "bfloat16"': lambda value: value in ("auto", "float32", "bfloat16"),
    '"bicubic" or "bilinear"': lambda value: value in ("bicubic", "bilinear"),
    '"ema", "raw" or ""': lambda value: value in ("ema", "raw", ""),
    '"pixel" or "const"': lambda value: value in ("pixel", "const"),
}
_FIELDS = {
    "seed": "from 0 to 4294967295",
    "epochs": _POSITIVE,
    "steps_per_eval": _NOT_NEGATIVE,
    "accumulate_steps": _POSITIVE,
    "init_kind": '"ema", "raw" or ""',
    "model.drop_rate": _BELOW_ONE,
    "model.drop_path_rate": _BELOW_ONE,
    "model.output_stride": "8, 16 or 32",
    "model.dtype": '"auto", "float32" or "bfloat16"',
    "data.image_size": _POSITIVE,
    "data.crop": "above 0 and at most 1",
    "data.interpolation": '"bicubic" or "bilinear"',
    "data.mean": "three numbers",
    "data.std": "three numbers above 0",
    "data.num_threads": _POSITIVE,
    "data.num_workers": "-1, 0 or more",
    "data.prefetch": _POSITIVE,
    "data.max_undecodable": _SHARE,
    "augment.scale": "two shares, the smaller first, above 0 and at most 1",
    "augment.ratio": "two numbers above 0, the smaller first",
    "augment.flip": _SHARE,
    "augment.color_jitter": _NOT_NEGATIVE,
    "augment.erasing_probability": _SHARE,
    "augment.erasing_mode": '"pixel" or "const"',
    "augment.erasing_area": "two shares, the smaller first, above 0 and at most 1",
    "augment.erasing_ratio": "two numbers above 0, the smaller first",
    "mixing.probability": _SHARE,
    "mixing.cutmix_probability": _SHARE,
    "mixing.mixup_alpha": _NOT_NEGATIVE,
    "mixing.cutmix_alpha": _NOT_NEGATIVE,
    "mixing.label_smoothing": _SHARE,
    "optimizer.momentum": _BELOW_ONE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "schedule.peak": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_start": _NOT_NEGATIVE,
    "schedule.final": _NOT_NEGATIVE,
    "schedule.base_batch_size": _NOT_NEGATIVE,
    "ema.decay": _BELOW_ONE,
    "eval.every_epochs": _POSITIVE,
    "checkpoint.every_steps": _NOT_NEGATIVE,
    "checkpoint.keep_best": _NOT_NEGATIVE,
    "profile.steps": _NOT_NEGATIVE,
    "profile.first_step": _POSITIVE,
    "distributed.timeout_seconds": "10 or more",
    "distributed.slow_timeout_seconds": "10 or more",
    "log_every_steps": _POSITIVE,
}


def find_problems(
    config: ml_collections.ConfigDict, devices: int, *, training: bool = True
) -> list[str]:
    """A line for every field that is out of its range, with what to type instead.

    Args:
      config: as in configs/default.py.
      devices: number of devices that a batch is split over.
      training: False leaves out whether a training step can be made of the fields together.
    """
    problems = [*out_of_range(config, _FIELDS), *_names(config)]
    if training:
        problems += _training(config, devices)
    if config.eval.batch_size < 1 or config.eval.batch_size % devices:
        wanted = f"a positive multiple of the {devices} devices"
        problems.append(_line(config, "eval.batch_size", wanted))
    return problems


def out_of_range(config: Mapping[str, Any], fields: Iterable[str]) -> Iterator[str]:
    """A line for each of ``fields``, such as "data.crop", that is out of its range by itself."""
    for field in fields:
        if not _RANGES[_FIELDS[field]](_value(config, field)):
            yield _line(config, field, _FIELDS[field])


def _names(config) -> Iterator[str]:
    """Fields whose words the code that reads them understands, or tells what is wrong with."""
    try:
        get_variant(config.model.name)
    except ValueError as error:
        yield f"--config.model.name: {error}"
    try:
        randaugment.parse(config.augment.randaugment)
    except ValueError as error:
        yield f"--{error}"


def _training(config, devices) -> Iterator[str]:
    if config.model.freeze_batch_norm and not config.init_from:
        wanted = "False where --config.init_from names no weights: random ones have no statistics"
        yield _line(config, "model.freeze_batch_norm", wanted)
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
