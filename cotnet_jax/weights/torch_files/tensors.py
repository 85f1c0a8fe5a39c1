"""Tensors of a torch file: views of storages, read when they are used."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.errors import TorchFileError

# torch's dtype names, and those of its typed storages ("FloatStorage" holds float32).
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "complex128": np.dtype(np.complex128),
    "complex64": np.dtype(np.complex64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    # Those of quantised tensors, as which they are refused, if needed, when the tensors are made.
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "QUInt4x2Storage": "uint8",
    "QUInt2x4Storage": "uint8",
}
# What a TorchTensor costs: steps of the budget, those of a dimension, and an estimate of its bytes,
# with those of its storage.
_TENSOR, _DIMENSION, _TENSOR_BYTES = 30, 3, 600


class Storage:
    """Bytes of a file, read when first used.

    Attributes:
      key: name in the file.
      nbytes: size in bytes.
      itemsize: bytes of an element, where the file first mentions the storage.
      swapped: whether elements are big-endian.
      read: returns the bytes, uint8 [nbytes], read-only, mapped from the file if they are not
        compressed; raises TorchFileError if they do not match their checksum.
    """

    __slots__ = ("itemsize", "key", "nbytes", "read", "swapped")

    def __init__(self, key: str, nbytes: int, itemsize: int):
        self.key = key
        self.nbytes = nbytes
        self.itemsize = itemsize
        self.swapped = False
        self.read: Callable[[], np.ndarray]


class TypedStorage:
    """A storage and the dtype of its elements, as a persistent id gives it."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: Storage, dtype: np.dtype):
        self.storage = storage
        self.dtype = dtype


class TorchTensor:
    """A strided view of a storage that is known to fit it; the values are read when used.

    Attributes:
      shape: a tuple, as an array's.
      dtype: NumPy dtype; bfloat16 and float8 are those of ml_dtypes.
      strides, offset: in elements.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, dtype: np.dtype, offset: int, shape, strides):
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.strides = strides

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that it becomes."""
        return self.size * self.dtype.itemsize

    @property
    def identity(self) -> tuple:
        """The same for tensors of one file with the same storage, place, shape and dtype."""
        return id(self.storage), self.dtype, self.offset, self.shape, self.strides

    def numpy(self) -> np.ndarray:
        """Read the values, [*shape], read-only; a view of the file's memory map if possible.

        Raises:
          TorchFileError: the storage does not match its checksum.
        """
        if not self.size:
            return np.empty(self.shape, self.dtype)
        itemsize = self.dtype.itemsize
        values: np.ndarray = np.ndarray(
            self.shape,
            # Any nonzero byte is true, but NumPy requires 0 or 1.
            np.uint8 if self.dtype == np.bool_ else self.dtype,
            self.storage.read(),
            self.offset * itemsize,
            [stride * itemsize for stride in self.strides],
        )
        if self.dtype == np.bool_:
            values = np.asarray(values != 0)
        elif self.storage.swapped:
            values = _swapped(values)
        elif not values.flags.aligned:
            # Storages of the legacy format start at any byte.
            values = values.copy()
        values.flags.writeable = False
        return values

    def __array__(self, dtype=None, copy=None):
        values = self.numpy()
        return np.array(values, dtype=dtype) if copy or dtype else values

    def __repr__(self) -> str:
        return f"TorchTensor(shape={self.shape}, dtype={self.dtype})"


def _swapped(values):
    """Return a copy with the bytes of every number in reverse order."""
    width = values.itemsize // 2 if values.dtype.kind == "c" else values.itemsize
    flat = values.flatten().view(f"u{width}").byteswap()
    return flat.view(values.dtype).reshape(values.shape)


def make_tensor(
    source, offset, shape, strides, budget: Budget, dtype: np.dtype | None = None
) -> TorchTensor:
    """Return the view that ``torch._utils._rebuild_tensor`` describes, checked against its storage.

    Raises:
      TorchFileError: an argument has the wrong type, the view exceeds the storage, or the budget
        is spent.
    """
    limits = budget.limits
    if not isinstance(source, TypedStorage):
        raise TorchFileError(f"a tensor of a {type(source).__name__}, not of a storage")
    dtype = dtype or source.dtype
    for what, values in (("shape", shape), ("strides", strides)):
        if type(values) not in (tuple, list) or len(values) > limits.dimensions:
            raise TorchFileError(
                f"a tensor's {what} must be a tuple of {limits.dimensions} at most, "
                f"not a {type(values).__name__}"
            )
    budget.spend(_TENSOR + _DIMENSION * len(shape), _TENSOR_BYTES)
    if len(shape) != len(strides):
        raise TorchFileError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < 2**48:
            raise TorchFileError("a tensor's shape, strides and offset must be integers >= 0")
    shape, strides = tuple(shape), tuple(strides)
    available = source.storage.nbytes // dtype.itemsize
    size = math.prod(shape)
    if not size:
        if math.prod(filter(None, shape)) >= 2**48 or offset > available:
            raise TorchFileError(f"an empty tensor of shape {shape} at element {offset}")
        return TorchTensor(source.storage, dtype, offset, shape, strides)
    end = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if end > available:
        raise TorchFileError(
            f"a tensor of shape {shape} with strides {strides} at element {offset} needs "
            f"{end:,} elements, its storage has {available:,}"
        )
    if size > max(available, limits.expanded_elements):
        raise TorchFileError(
            f"a tensor of shape {shape} repeats a storage of {available:,} elements"
        )
    return TorchTensor(source.storage, dtype, offset, shape, strides)
