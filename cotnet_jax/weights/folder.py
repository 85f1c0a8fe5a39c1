"""A folder of weights: an Orbax checkpoint, and a JSON file that says whose it is.

FOLDER/cotnet.json   model, classes, source, evaluation settings, versions, checksums
FOLDER/weights/      {"params", "batch_stats"}, float32
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cotnet_jax.checkpoint import checksums

DESCRIPTION = "cotnet.json"
ARRAYS = "weights"
FORMAT = "cotnet_jax weights 1"
_VERSIONS_OF = ("jax", "flax", "orbax-checkpoint", "numpy")


class WeightsError(ValueError):
    """Weights cannot be read or written; the message says which, why, and what to do."""


def is_weights_folder(path) -> bool:
    return (pathlib.Path(path) / DESCRIPTION).is_file()


def read_description(path) -> dict[str, Any]:
    """The JSON of a folder.

    Raises:
      WeightsError: it is damaged or of another version.
    """
    file = pathlib.Path(path) / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        version = description["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file}: cannot be read: {error}") from None
    if version != FORMAT:
        raise WeightsError(
            f"{file}: is of the format {version!r}, this program reads {FORMAT!r}: convert the "
            "weights again"
        )
    return description


def read_arrays(path) -> dict[str, dict]:
    """{"params", "batch_stats"} of a folder, nested dicts of NumPy arrays.

    Raises:
      WeightsError: files are missing or have changed since they were written.
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
    # Views of JAX's own buffers: going back to a CPU device costs no copy.
    return jax.tree.map(np.asarray, arrays)


class NewFolder:
    """Writes a folder under another name; ``publish`` gives it its own, in one step.

    A context manager: without ``publish`` nothing is left of it.

    Raises:
      WeightsError: something is there already, or the place cannot be written to.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).absolute()
        self.unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise WeightsError(f"{self.path} exists already: delete it or give another --output")

    def __enter__(self) -> "NewFolder":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.unfinished.mkdir()
        except OSError as error:
            raise WeightsError(f"cannot write to {self.path.parent}: {error}") from None
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def write(self, variables: dict, description: dict[str, Any]) -> None:
        """Writes arrays and description, to be read back from ``unfinished``."""
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(self.unfinished / ARRAYS, ocp.args.PyTreeSave(variables))
        description = {
            "format": FORMAT,
            **description,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS_OF},
            "files": checksums.checksums(epath.Path(self.unfinished / ARRAYS)),
        }
        text = json.dumps(description, indent=2) + "\n"
        (self.unfinished / DESCRIPTION).write_text(text)

    def publish(self) -> None:
        if self.path.exists():
            self.path.rmdir()
        self.unfinished.rename(self.path)


def array_digests(tree: dict) -> dict[str, tuple]:
    """{path: (dtype, shape, digest of the bytes)} of every array of a tree.

    Two trees with the same digests have the same arrays bit by bit, also where they are NaN; to
    compare them in this way they need not both be in memory.
    """
    digests = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest = hashlib.blake2b(leaf.tobytes(), digest_size=16).digest()
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digests[name] = (leaf.dtype, leaf.shape, digest)
    return digests


def differing(first: dict[str, tuple], second: dict[str, tuple]) -> list[str]:
    """Paths whose digests differ or are in one of the two alone."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


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
