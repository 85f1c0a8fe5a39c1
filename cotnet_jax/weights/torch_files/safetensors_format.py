"""The safetensors format, through its own library: https://github.com/huggingface/safetensors."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.tensors import DTYPES

MAX_HEADER_BYTES = 16 * 2**20
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafeTensor:
    """A tensor of a safetensors file, read when used; attributes as in TorchTensor."""

    __slots__ = ("_file", "_name", "dtype", "shape")

    def __init__(self, file, name: str):
        header = file.get_slice(name)
        self._file = file
        self._name = name
        self.shape = tuple(header.get_shape())
        stored = header.get_dtype()
        if stored not in _NAMES:
            raise TorchFileError(f"tensor {printable(name)} has the unknown dtype {stored}")
        self.dtype = DTYPES[_NAMES[stored]]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def numpy(self) -> np.ndarray:
        """Read the values, [*shape]."""
        return np.asarray(self._file.get_tensor(self._name)).reshape(self.shape)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        return f"SafeTensor(shape={self.shape}, dtype={self.dtype})"


def read_safetensors(path) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """Return (tensors by name, the header's metadata).

    Raises:
      TorchFileError: the file is damaged.
    """
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(MAX_HEADER_BYTES, os.path.getsize(path) - 8):
        raise TorchFileError(f"claims a header of {header:,} bytes")
    try:
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
        names = file.keys()
        return {name: SafeTensor(file, name) for name in names}, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise TorchFileError(printable(str(error))) from None


def write_safetensors(
    path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any layout, or nothing on an error; an existing file is replaced.

    In PyTorch, read it by ``safetensors.torch.load_file``.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, os.fspath(temporary), metadata=dict(metadata or {}))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
