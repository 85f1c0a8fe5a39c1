"""Check the entries of a JSON file that describes weights, before they are used."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cotnet_jax.config import RANGES
from cotnet_jax.data.file_names import as_text
from cotnet_jax.models.variants import VARIANTS
from cotnet_jax.weights.torch_files.inert import printable

_LONGEST_NAME = 1000
_MOST_LINES = 20

# What an entry must be, to follow "must be", and whether a value is that.
Check = tuple[str, Callable[[Any], bool]]
MODEL: Check = ("the name of a model", lambda value: value in VARIANTS)
KIND: Check = ('"ema" or "raw"', lambda value: value in ("ema", "raw"))
COUNT: Check = ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
DICTIONARY: Check = ("a dictionary", lambda value: type(value) is dict)


def entry_problems(content: Mapping[str, Any], checks: Mapping[str, Check]) -> Iterator[str]:
    """Yield a line for each entry that is missing or is not what it must be."""
    for name, (wanted, usable) in checks.items():
        yield from _check(name, content.get(name), wanted, usable)


def settings_problems(
    values: Any, section: str = "settings", *, largest_image: float = math.inf
) -> Iterator[str]:
    """Yield a line for each evaluation setting that is missing, unknown or out of its range.

    Args:
      values: the settings.
      section: where they are, as the lines call it.
      largest_image: side in pixels.
    """
    image_size = RANGES["data.image_size"]
    most = "" if largest_image == math.inf else f", at most {largest_image}"
    types = _SETTING_TYPES | {
        "image_size": lambda value: type(value) is int and value <= largest_image
    }
    messages = {"image_size": image_size.message + most}
    yield from _range_problems(section, values, types, "data", messages, required=True)


def attribute_problems(values: Any, section: str = "attributes") -> Iterator[str]:
    """Yield a line for each attribute of the network that is unknown or out of its range."""
    yield from _range_problems(section, values, _ATTRIBUTE_TYPES, "model", {}, required=False)


def name_problems(names: Any, count: Any) -> Iterator[str]:
    """Yield a line for each name of a class that is none; None stands for unknown ones."""
    if names is None:
        return
    if type(names) is not list or len(names) != count:
        found = f"{len(names)}" if type(names) is list else show(names)
        yield f"class_names: must be null or as many names as there are classes, not {found}"
        return
    for index, name in enumerate(names):
        yield from _check(f"class_names[{index}]", name, "one line of text", _is_name)


def listed(problems: Sequence[str]) -> str:
    """Return the number of problems and the first of them, a line each, to follow "FILE: "."""
    more = [f"and {len(problems) - _MOST_LINES} more"] * (len(problems) > _MOST_LINES)
    lines = [*problems[:_MOST_LINES], *more]
    return "\n  ".join([f"{len(problems)} entries cannot be used:", *lines])


def show(value: Any) -> str:
    """Return the beginning of a value, fit for a line of an error."""
    return printable(repr(value)[:200])


def _check(name, value, wanted, usable) -> Iterator[str]:
    try:
        good = usable(value)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        yield f"{name}: must be {wanted}, not {show(value)}"


def _numbers(value):
    return type(value) is list and all(type(x) in (int, float) for x in value)


_SETTING_TYPES = {
    "image_size": lambda value: type(value) is int,
    "crop": lambda value: type(value) in (int, float) and math.isfinite(value),
    "interpolation": lambda value: type(value) is str,
    "mean": _numbers,
    "std": _numbers,
}
_ATTRIBUTE_TYPES = {"output_stride": lambda value: type(value) is int}


def _range_problems(section, values, types, config_section, messages, *, required):
    if type(values) is not dict:
        yield f"{section}: must be a dictionary, not {show(values)}"
        return
    for name in values:
        if name not in types:
            yield f"{section}.{printable(name)}: unknown"
    for name, has_type in types.items():
        if name in values or required:
            limits = RANGES[f"{config_section}.{name}"]
            yield from _check(
                f"{section}.{name}",
                values.get(name),
                messages.get(name, limits.message),
                lambda value, has_type=has_type, limits=limits: (
                    has_type(value) and limits.contains(value)
                ),
            )


def _is_name(value):
    return type(value) is str and len(value) <= _LONGEST_NAME and as_text(value) == value
