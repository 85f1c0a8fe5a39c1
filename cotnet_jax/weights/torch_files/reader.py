"""Open a PyTorch file of any format, without PyTorch."""

import dataclasses
import mmap
import os
import pathlib
from typing import Any

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.legacy_format import read_legacy
from cotnet_jax.weights.torch_files.safetensors_format import read_safetensors
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
)


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The contents of a file.

    Attributes:
      path: the file.
      format: "zip", "legacy" or "safetensors".
      value: the object: dictionaries, lists, tuples, scalars, tensors (TorchTensor or SafeTensor,
        whose values ``.numpy()`` reads), InertObject and InertGlobal.
      inert: names of the classes and functions in the file that were neither imported nor called.
      metadata: metadata of a safetensors file.
    """

    path: str
    format: str
    value: Any
    inert: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def read_torch_file(path: str | os.PathLike) -> TorchFile:
    """Read a file of ``torch.save`` (zip or legacy format) or safetensors; nothing in it is run.

    Tensors are mapped from the file, which must neither change nor shrink while they are in use.
    Memory grows with the pickle (at most 16 MiB), not with the tensors.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      TorchFileError: the file is damaged, has another format, or claims more than it has.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        if is_unpacked(path):
            raise TorchFileError(
                "unpacked from a PyTorch file: give the .pth.tar or .pth file as it was "
                "downloaded, without unpacking it"
            )
        if path.is_dir():
            raise TorchFileError("a folder, not a file of PyTorch")
        with open(path, "rb") as file:
            start = file.read(512)
            if not start:
                raise TorchFileError("an empty file")
            # A safetensors file begins with the size of its JSON header, which can be any bytes.
            if start[8:9] == b"{":
                tensors, metadata = read_safetensors(path)
                return TorchFile(str(path), "safetensors", tensors, metadata=metadata)
            if start[:4] == b"PK\x03\x04":
                return TorchFile(str(path), "zip", *read_zip(_map(file)))
            if start[:1] == b"\x80":
                return TorchFile(str(path), "legacy", *read_legacy(_map(file)))
        raise TorchFileError(_what_else(start))
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from None


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
    return "neither a file of torch.save (zip or legacy format) nor of safetensors"
