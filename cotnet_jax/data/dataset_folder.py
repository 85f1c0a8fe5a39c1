"""Folders of TFDS datasets that others may have written: checked before TFDS believes them."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from cotnet_jax import command_line
from cotnet_jax.command_line import first_line

# Keys of features.json whose values name a Python class; TFDS imports its module.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_TFDS_FEATURES = "tensorflow_datasets.core.features."
_READERS = 16


class DatasetError(ValueError):
    """The configured dataset cannot be read; the message says why and what to type."""


class FileInstruction(Protocol):
    """The part of a shard that a split reads; TFDS's own class."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_folder(folder: str | os.PathLike) -> tfds.core.DatasetBuilder:
    """Open a dataset by the files in its folder, importing nothing that they name.

    Raises:
      DatasetError: a metadata file is missing or damaged, or features.json names a class that is
        not one of TFDS's own features.
    """
    folder = Path(folder)
    check_features(folder)
    try:
        return tfds.builder_from_directory(folder)
    # Protocol buffers, JSON, versions and class names each have exceptions of their own.
    except Exception as error:
        raise DatasetError(
            f"{folder / 'dataset_info.json'}: cannot be read, the dataset's metadata is damaged "
            f"({first_line(error)}); {remedy(folder)}"
        ) from error


def check_features(folder: str | os.PathLike) -> None:
    """Refuse a folder whose features.json would have TFDS import other code than its own.

    Raises:
      DatasetError: names the file and the class; or the file is missing or no JSON.
    """
    path = Path(folder) / "features.json"
    try:
        features = json.loads(path.read_text(encoding="utf-8"))
        foreign = sorted({name for name in _class_names(features) if not _is_tfds_feature(name)})
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        problem = f"is damaged ({first_line(error)})"
    else:
        if not foreign:
            return
        raise DatasetError(
            f"{path}: names the Python class {foreign[0]!r}, which is not one of TFDS's own "
            f"features ({_TFDS_FEATURES}*) and is not imported; {remedy(folder)}"
        )
    raise DatasetError(f"{path}: {problem}; {remedy(folder)}")


def check_shards(folder: str | os.PathLike, instructions: Iterable[FileInstruction]) -> None:
    """Check that the files of a split are there and have as many records as the metadata says.

    Each file's own index is read, not its records.

    Raises:
      DatasetError: lists the files that are missing, empty, damaged or too short.
    """
    # A split may have several parts of one file.
    expected = {str(part.filename): part.examples_in_shard for part in instructions}
    with ThreadPoolExecutor(_READERS) as pool:
        problems = [
            problem for problem in pool.map(_shard_problem, expected, expected.values()) if problem
        ]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DatasetError(
            f"{len(problems)} of the {len(expected)} files in {folder} cannot be used:\n  "
            + "\n  ".join(problems[:5])
            + f"{more}\n{remedy(folder)}"
        )


def remedy(folder: str | os.PathLike) -> str:
    """Return what to do about a damaged dataset."""
    return (
        f"copy the dataset again, or delete {folder} and prepare it again: "
        f"{command_line.command('prepare')} --help"
    )


def num_records(path: str | os.PathLike) -> int:
    """Return the number of records of an ArrayRecord file.

    Raises:
      OSError: the file is missing, empty or damaged; the message names it.
    """
    path = Path(path)
    if not path.stat().st_size:
        raise OSError(f"{path}: is empty")
    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    # The readers of Riegeli raise whatever absl::Status was mapped to.
    except Exception as error:
        raise OSError(
            f"{path}: is damaged or truncated, {path.stat().st_size:,} bytes ({first_line(error)})"
        ) from None


def _shard_problem(path: str, expected: int) -> str:
    try:
        found = num_records(path)
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return str(error)
    return "" if found == expected else f"{path}: has {found} records instead of {expected}"


def _class_names(value: Any) -> Iterator[str]:
    """Yield every name of a class in parsed JSON."""
    if isinstance(value, dict):
        yield from (value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str))
        for inner in value.values():
            yield from _class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_names(inner)


def _is_tfds_feature(name: str) -> bool:
    """Return whether TFDS has imported this class by itself, so that nothing is left to import."""
    known: Any = tfds.features.FeatureConnector
    return name.startswith(_TFDS_FEATURES) and name in known._registered_features
