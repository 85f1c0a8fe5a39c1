"""A folder for the Hub: weights under PyTorch's names, their settings, and a model card.

FOLDER/model.safetensors  the weights, under the names of ``name_map``
FOLDER/cotnet_hub.json    model, classes, kind, evaluation settings, source, versions, checksums
FOLDER/README.md          the model card

Such folders come from anywhere, so every entry of the JSON file is checked before it is used.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cotnet_jax import files
from cotnet_jax.config import RANGES
from cotnet_jax.data.file_names import as_text
from cotnet_jax.models.variants import VARIANTS
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files import LIMITS, TorchFileError, write_safetensors
from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.safetensors_format import parse_json

FORMAT = "cotnet_jax hub 1"
SETTINGS = "cotnet_hub.json"
TENSORS = "model.safetensors"
CARD = "README.md"
# What loading needs of a repository.
NEEDED = [SETTINGS, TENSORS]
# Sides of images, in pixels, beyond those that any CoTNet was evaluated at.
_LARGEST_IMAGE = 4096
_LONGEST_NAME = 1000
_LINES = 20


@dataclasses.dataclass(frozen=True)
class HubSettings:
    """What a folder says of its weights.

    Attributes:
      model, settings, attributes, class_names: as in ``Weights``.
      kind: "ema" or "raw".
      num_classes: number of logits.
      sha256: of the file of the weights.
      source: where they come from, for people.
    """

    model: str
    kind: Any
    num_classes: int
    settings: dict[str, Any]
    attributes: dict[str, Any]
    class_names: tuple[str, ...] | None
    sha256: str
    source: dict[str, Any]


def is_hub_folder(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder that this module has written."""
    return (pathlib.Path(path) / SETTINGS).is_file()


def write(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    settings: HubSettings,
    *,
    card: str,
    more: Mapping[str, Any],
) -> None:
    """Write the three files.

    Args:
      path: an existing folder.
      tensors: the weights, under PyTorch's names.
      settings: its ``sha256`` is not looked at.
      card: the text of the model card, in which {sha256} stands for that of the weights.
      more: entries of the JSON file for people alone.
    """
    write_safetensors(
        path / TENSORS,
        tensors,
        {"model": settings.model, "weights": settings.kind, "format": "pt"},
    )
    sha256 = files.sha256(path / TENSORS)
    content = {
        "format": FORMAT,
        **dataclasses.asdict(dataclasses.replace(settings, sha256=sha256)),
        **more,
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    files.write_whole(path / SETTINGS, text)
    files.write_whole(path / CARD, card.replace("{sha256}", sha256))


def read_settings(path: pathlib.Path) -> HubSettings:
    """Read and check the JSON file, and compare the weights with its checksum.

    Raises:
      WeightsError: a file is missing or damaged, has another version of the format, or has entries
        that cannot be used; lists all of them.
    """
    file = path / SETTINGS
    missing = [name for name in NEEDED if not (path / name).is_file()]
    if missing:
        raise WeightsError(
            f"{path}: has no {' and no '.join(missing)}, so it is no complete folder of "
            "cotnet_jax.push_to_hub or export_for_hub; if it holds another file of weights, "
            "download that file and give its path"
        )
    content = _parse(file)
    if content.get("format") != FORMAT:
        raise WeightsError(
            f"{file}: has the format {_show(content.get('format'))}, but this version reads "
            f"{FORMAT!r}"
        )
    problems = list(_problems(content))
    if problems:
        more = [f"and {len(problems) - _LINES} more"] * (len(problems) > _LINES)
        raise WeightsError(
            f"{file}: {len(problems)} entries cannot be used:\n  "
            + "\n  ".join([*problems[:_LINES], *more])
        )
    fields = [field.name for field in dataclasses.fields(HubSettings)]
    entries: dict[str, Any] = {name: content.get(name) for name in fields}
    names = entries["class_names"]
    entries["class_names"] = None if names is None else tuple(names)
    settings = HubSettings(**entries)
    _check_sum(path / TENSORS, settings.sha256)
    return settings


def _parse(file: pathlib.Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LIMITS.header_bytes:
            raise WeightsError(f"{file}: has {file.stat().st_size:,} bytes")
        return parse_json(file.read_bytes(), Budget(), "the file")
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror or error}") from None
    except TorchFileError as error:
        raise WeightsError(f"{file}: {error}") from None


def _check_sum(file: pathlib.Path, expected: str) -> None:
    with open(file, "rb") as opened:
        is_pointer = opened.read(64).startswith(b"version https://git-lfs")
    if is_pointer:
        raise WeightsError(f"{file}: a Git LFS pointer, not the weights: run `git lfs pull`")
    if files.sha256(file) != expected:
        raise WeightsError(
            f"{file}: damaged, it is not the file that {SETTINGS} has the checksum of: get it again"
        )


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each entry that cannot be used."""
    checks = {
        "model": ("the name of a model", lambda value: value in VARIANTS),
        "kind": ('"ema" or "raw"', lambda value: value in ("ema", "raw")),
        "num_classes": ("a number", lambda value: type(value) is int and value >= 0),
        "sha256": ("a SHA-256", lambda value: type(value) is str and len(value) == 64),
        "source": ("a dictionary", lambda value: type(value) is dict),
    }
    for name, (wanted, usable) in checks.items():
        yield from _check(name, content.get(name), wanted, usable)
    yield from _range_problems("settings", content.get("settings"), _SETTING_TYPES, "data")
    yield from _range_problems("attributes", content.get("attributes"), _ATTRIBUTE_TYPES, "model")
    yield from _name_problems(content.get("class_names"), content.get("num_classes"))


def _check(name, value, wanted, usable) -> Iterator[str]:
    try:
        good = usable(value)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        yield f"{name}: must be {wanted}, not {_show(value)}"


def _numbers(value):
    return type(value) is list and all(type(x) in (int, float) for x in value)


_SETTING_TYPES = {
    "image_size": lambda value: type(value) is int and value <= _LARGEST_IMAGE,
    "crop": lambda value: type(value) in (int, float) and math.isfinite(value),
    "interpolation": lambda value: type(value) is str,
    "mean": _numbers,
    "std": _numbers,
}
_ATTRIBUTE_TYPES = {"output_stride": lambda value: type(value) is int}


def _range_problems(section, values, types, config_section) -> Iterator[str]:
    if type(values) is not dict:
        yield f"{section}: must be a dictionary, not {_show(values)}"
        return
    for name in values:
        if name not in types:
            yield f"{section}.{printable(name)}: unknown"
    for name, has_type in types.items():
        if name in values or section == "settings":
            limits = RANGES[f"{config_section}.{name}"]
            most = f", at most {_LARGEST_IMAGE}" if name == "image_size" else ""
            yield from _check(
                f"{section}.{name}",
                values.get(name),
                limits.message + most,
                lambda value, has_type=has_type, limits=limits: (
                    has_type(value) and limits.contains(value)
                ),
            )


def _name_problems(names, count) -> Iterator[str]:
    if names is None:
        return
    if type(names) is not list or len(names) != count:
        found = f"{len(names)}" if type(names) is list else _show(names)
        yield f"class_names: must be null or as many names as there are classes, not {found}"
        return
    for index, name in enumerate(names):
        yield from _check(f"class_names[{index}]", name, "one line of text", _is_name)


def _is_name(value):
    return type(value) is str and len(value) <= _LONGEST_NAME and as_text(value) == value


def _show(value) -> str:
    return printable(str(value)[:200])
