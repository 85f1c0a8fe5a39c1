"""A folder for the Hub: weights under PyTorch's names, their settings, and a model card.

FOLDER/model.safetensors  the weights, under the names of ``name_map``
FOLDER/cotnet_hub.json    model, classes, kind, evaluation settings, source, versions, checksums
FOLDER/README.md          the model card

Such folders come from anywhere, so every entry of the JSON file is checked before it is used.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cotnet_jax import files
from cotnet_jax.weights import entry_checks
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files import LIMITS, TorchFileError, write_safetensors
from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.safetensors_format import parse_json

FORMAT = "cotnet_jax hub 1"
SETTINGS = "cotnet_hub.json"
TENSORS = "model.safetensors"
CARD = "README.md"
# What loading needs of a repository.
NEEDED = [SETTINGS, TENSORS]
# Sides of images, in pixels, beyond those that any CoTNet was evaluated at.
_LARGEST_IMAGE = 4096


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
            f"{file}: has the format {entry_checks.show(content.get('format'))}, but this version "
            f"reads {FORMAT!r}"
        )
    problems = list(_problems(content))
    if problems:
        raise WeightsError(f"{file}: {entry_checks.listed(problems)}")
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
        "model": entry_checks.MODEL,
        "kind": entry_checks.KIND,
        "num_classes": entry_checks.COUNT,
        "sha256": ("a SHA-256", lambda value: type(value) is str and len(value) == 64),
        "source": entry_checks.DICTIONARY,
    }
    yield from entry_checks.entry_problems(content, checks)
    yield from entry_checks.settings_problems(content.get("settings"), largest_image=_LARGEST_IMAGE)
    yield from entry_checks.attribute_problems(content.get("attributes"))
    yield from entry_checks.name_problems(content.get("class_names"), content.get("num_classes"))
