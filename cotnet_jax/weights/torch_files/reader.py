"""Open a PyTorch file of any format, without PyTorch."""

import dataclasses
import mmap
import os
import pathlib
from typing import Any

from cotnet_jax.garbage_collector import without_garbage_collector
from cotnet_jax.weights.torch_files.budget import LIMITS, Budget, Limits
from cotnet_jax.weights.torch_files.errors import TorchFileError, errors_of
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.legacy_format import read_legacy
from cotnet_jax.weights.torch_files.safetensors_format import (
    find_index,
    read_index,
    read_safetensors,
)
from cotnet_jax.weights.torch_files.zip_format import read_zip

# First bytes -> what the file is instead, and what to do.
_OTHERS = (
    (b"<", "a web page: the download failed, get the file again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file: run `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x89HDF", "an HDF5 file, not one of PyTorch"),
    (b"\x93NUMPY", "a NumPy file, not one of PyTorch"),
    (b"{", "JSON; of shards only those of safetensors are read, by NAME.safetensors.index.json"),
    (b"\x08\x08\x12\ncotnet_jax", "an exported ONNX file: give the weights that it was made from"),
)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The contents of a file.

    Attributes:
      path: the file, or the index of its shards.
      format: "zip", "legacy" or "safetensors".
      value: the object: dictionaries, lists, tuples, scalars, tensors (TorchTensor, whose values
        ``.numpy()`` reads), InertObject and InertGlobal.
      inert: names of the classes and functions in the file that were neither imported nor called.
      metadata: metadata of a safetensors file.
      budget: what is left of the limits.
    """

    path: str
    format: str
    value: Any
    inert: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    budget: Budget = dataclasses.field(default_factory=Budget, repr=False, compare=False)


def read_torch_file(path: str | os.PathLike, limits: Limits = LIMITS) -> TorchFile:
    """Read a file of ``torch.save`` (zip or legacy format) or safetensors; nothing in it is run.

    Tensors are mapped from the file, which must neither change nor shrink while they are in use.
    Memory grows with the pickle, not with the tensors.

    Args:
      path: the file; for a state dict in shards NAME.safetensors.index.json, or its folder.
      limits: the work and memory that the file may take.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      TorchFileError: the file is damaged, has another format, claims more than it has, or exceeds
        the limits.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    budget = Budget(limits)
    index = find_index(path)
    # Looking through all that was read would take a third of the time.
    with errors_of(index or path), without_garbage_collector():
        if index:
            return _read_shards(index, budget)
        if is_unpacked(path):
            raise TorchFileError(
                "unpacked from a PyTorch file: give the .pth.tar or .pth file as it was "
                "downloaded, without unpacking it"
            )
        if path.is_dir():
            raise TorchFileError("a folder, not a file of PyTorch")
        return _read_file(path, budget)


def files_of(path: str | os.PathLike) -> list[pathlib.Path]:
    """Return the files that ``read_torch_file(path)`` reads: one, or an index and its shards."""
    index = find_index(path)
    if not index:
        return [pathlib.Path(path)]
    with errors_of(index):
        return [index, *(index.with_name(name) for name in read_index(index, Budget()))]


def _read_file(path, budget):
    with open(path, "rb") as file:
        start = file.read(512)
        if not start:
            raise TorchFileError("an empty file")
        # A safetensors file begins with the size of its JSON header, which can be any bytes.
        if start[8:9] == b"{":
            tensors, metadata = read_safetensors(_map(file), budget)
            return TorchFile(str(path), "safetensors", tensors, metadata=metadata, budget=budget)
        if start[:4] == b"PK\x03\x04":
            return TorchFile(str(path), "zip", *read_zip(_map(file), budget), budget=budget)
        if start[:1] == b"\x80":
            return TorchFile(str(path), "legacy", *read_legacy(_map(file), budget), budget=budget)
    raise TorchFileError(_what_else(start))


def _read_shards(index, budget):
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file, names in read_index(index, budget).items():
        path = index.with_name(file)
        # Also where no file can have the name.
        if not os.path.isfile(path):
            raise TorchFileError(
                f"its shard {printable(file)} is missing: get it too, into the same folder"
            )
        with errors_of(path):
            shard = _read_file(path, budget)
            if shard.format != "safetensors":
                raise TorchFileError(f"a shard in the {shard.format} format, not safetensors")
            missing = [name for name in names if name not in shard.value]
            if missing:
                raise TorchFileError(
                    f"lacks {len(missing)} tensors that the index promises, such as "
                    f"{printable(missing[0])}"
                )
        tensors.update((name, shard.value[name]) for name in names)
        metadata.update(shard.metadata)
    return TorchFile(str(index), "safetensors", tensors, metadata=metadata, budget=budget)


def is_unpacked(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is the result of unpacking a PyTorch file, or a file in it."""
    path = pathlib.Path(path)
    return path.name == "data.pkl" or any(path.glob("data.pkl")) or any(path.glob("*/data.pkl"))


def _map(file):
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _what_else(start):
    for first, what in _OTHERS:
        if start.lstrip().startswith(first):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it, and give the file inside"
    return "neither a file of torch.save (zip or legacy format) nor of safetensors, nor HDF5"
