"""A folder of weights: an Orbax checkpoint, and a JSON file that describes it.

FOLDER/cotnet.json   model, classes, "weights" (their kind), source, evaluation settings, versions,
                     checksums
FOLDER/weights/      {"params", "batch_stats"}, float32
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cotnet_jax import files
from cotnet_jax.checkpoint import checksums
from cotnet_jax.weights import entry_checks

DESCRIPTION = "cotnet.json"
ARRAYS = "weights"
FORMAT = "cotnet_jax weights 1"
ANOTHER_OUTPUT = "give another --output"
_ENTRIES = {
    "model": entry_checks.MODEL,
    "weights": entry_checks.KIND,
    "num_batches_tracked": entry_checks.COUNT,
    "source": entry_checks.DICTIONARY,
    "files": entry_checks.DICTIONARY,
}
_VERSIONS_OF = ("jax", "flax", "orbax-checkpoint", "numpy")


class WeightsError(ValueError):
    """Weights cannot be read or written; the message says why, and what to do."""


def is_weights_folder(path) -> bool:
    """Return whether ``path`` is a folder that this module has written."""
    return (pathlib.Path(path) / DESCRIPTION).is_file()


def read_description(path) -> dict[str, Any]:
    """Return the description of a folder, parsed from its JSON, with checked entries.

    Raises:
      WeightsError: it is damaged, has another version of the format, or has entries that cannot be
        used; lists them.
    """
    file = pathlib.Path(path) / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        version = description["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{file}: cannot be read: {error}") from None
    if version != FORMAT:
        raise WeightsError(
            f"{file}: has the format {entry_checks.show(version)}, but this version reads "
            f"{FORMAT!r}: convert the weights again"
        )
    description = _earlier_entries(description) | description
    problems = list(_problems(description))
    if problems:
        raise WeightsError(f"{file}: {entry_checks.listed(problems)}\nConvert the weights again.")
    return description


def read_arrays(path) -> dict[str, dict]:
    """Read {"params", "batch_stats"} of a folder, nested dicts of float32 NumPy arrays.

    Raises:
      WeightsError: files are missing, or have changed since they were written.
    """
    path = pathlib.Path(path)
    _check_files(path, read_description(path)["files"])
    folder = (path / ARRAYS).absolute()
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with ocp.Checkpointer(_handler()) as checkpointer:
        try:
            tree = checkpointer.metadata(folder).item_metadata.tree
            how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=cpu), tree)
            arrays = checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=how))
        except Exception as error:
            raise WeightsError(f"{folder}: cannot be read: {error}") from None
    # These are views of JAX's buffers, so that going back to a CPU device costs no copy.
    return jax.tree.map(np.asarray, arrays)


def versions() -> dict[str, str]:
    """Return the versions of the packages that read and write weights."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


class NewFolder:
    """Writes a folder under a temporary name; ``publish`` renames it, in one step.

    A context manager, which removes the folder unless it was published.

    Args:
      path: the folder.
      otherwise: what to do if it cannot be written, besides deleting it.

    Raises:
      WeightsError: ``path`` exists, or its parent cannot be written to.
    """

    def __init__(self, path: str | os.PathLike, otherwise: str = ANOTHER_OUTPUT):
        self.path = files.local(path)
        self._otherwise = otherwise
        self.unfinished = files.unfinished_name(self.path)
        self._stack = contextlib.ExitStack()
        self._require_new()

    def __enter__(self) -> "NewFolder":
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_output(self.path, self._otherwise))
            self._require_new()
            stack.callback(shutil.rmtree, self.unfinished, ignore_errors=True)
            try:
                self.unfinished.mkdir()
            except OSError as error:
                raise WeightsError(f"cannot write to {self.path.parent}: {error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _require_new(self) -> None:
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise WeightsError(f"{self.path} exists: delete it or {self._otherwise}")

    def write(self, variables: dict, description: dict[str, Any]) -> None:
        """Write arrays and description into ``unfinished``."""
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(self.unfinished / ARRAYS, ocp.args.PyTreeSave(variables))
        description = {
            "format": FORMAT,
            **description,
            "versions": versions(),
            "files": checksums.checksums(epath.Path(self.unfinished / ARRAYS)),
        }
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
        files.write_whole(self.unfinished / DESCRIPTION, text)

    def publish(self) -> None:
        """Give the folder its final name."""
        if self.path.exists():
            self.path.rmdir()
        self.unfinished.rename(self.path)
        files.sync_folder(self.path.parent)


@contextlib.contextmanager
def lock_output(path: pathlib.Path, otherwise: str = ANOTHER_OUTPUT) -> Iterator[None]:
    """Hold a file or folder that is to be created, and clear what killed processes left of it.

    Raises:
      LockedError: another process is creating it.
      WeightsError: its parent cannot be written to.
    """
    lock = files.FolderLock(files.lock_file_beside(path), f"{path} is being written", otherwise)
    try:
        lock.acquire()
    except files.LockedError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot write to {path.parent}: {error}") from None
    with lock:
        # Those of the lock itself, and those that earlier versions left.
        lock_name, name = glob.escape(lock.path.name), glob.escape(path.name)
        patterns = (f"{files.UNFINISHED}*-{lock_name}", f".{name}.*.partial")
        files.remove_leftovers(path.parent, *patterns, of=path.name)
        yield


def array_digests(tree: dict) -> dict[str, tuple]:
    """Return {path: (dtype, shape, digest of the bytes)} of every array of a tree.

    Equal digests mean bitwise equal arrays, NaNs included, without both in memory.
    """
    digests = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest = hashlib.blake2b(leaf.tobytes(), digest_size=16).digest()
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digests[name] = (leaf.dtype, leaf.shape, digest)
    return digests


def differing(first: dict[str, tuple], second: dict[str, tuple]) -> list[str]:
    """Return the paths whose digests differ, or that only one of the two has."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


def _problems(description: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each entry that cannot be used."""
    yield from entry_checks.entry_problems(description, _ENTRIES)
    yield from entry_checks.settings_problems(description["settings"])
    yield from entry_checks.attribute_problems(description["attributes"])
    names, count = description.get("class_names"), description.get("num_classes")
    yield from entry_checks.name_problems(names, count)


def _earlier_entries(description: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that earlier versions left out; they evaluated as default_cfg says."""
    default_cfg = description.get("default_cfg")
    if not isinstance(default_cfg, dict):
        return {"settings": None, "attributes": {}}
    size = default_cfg.get("input_size")
    settings = {key: default_cfg.get(key) for key in ("crop", "interpolation", "mean", "std")}
    settings["image_size"] = size[0] if isinstance(size, list) and size else None
    return {"settings": settings, "attributes": {}}


def _handler():
    # Compression takes 7 % off float weights and costs more time than it saves.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _check_files(path, expected):
    try:
        found = checksums.checksums(epath.Path(path / ARRAYS))
    except OSError as error:
        raise WeightsError(f"{path}: {error}") from None
    wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    if wrong:
        raise WeightsError(
            f"{path}: damaged, {len(wrong)} of {len(expected)} files are missing or have changed "
            f"since they were written: {', '.join(wrong[:5])}. Convert the weights again."
        )
