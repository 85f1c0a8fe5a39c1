"""The safetensors format: the size of a JSON header, the header, and the tensors' bytes.

https://github.com/huggingface/safetensors describes it. A state dict can be in shards: several
such files, and NAME.safetensors.index.json, which names the file of each tensor.
"""

import json
import mmap
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from cotnet_jax import files
from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertGlobal, InertObject, printable
from cotnet_jax.weights.torch_files.pickle_machine import describe
from cotnet_jax.weights.torch_files.tensors import (
    DTYPES,
    Storage,
    TorchTensor,
    TypedStorage,
    make_tensor,
)

INDEX_SUFFIX = ".safetensors.index.json"
# Steps of the budget that an entry of the header costs, besides its tensor.
_ENTRY = 60
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
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


def read_safetensors(
    mapped: mmap.mmap, budget: Budget
) -> tuple[dict[str, TorchTensor | InertObject], dict[str, str]]:
    """Return (tensors by name, the header's metadata).

    Tensors of a dtype that NumPy lacks, such as 4-bit floats, are inert objects.

    Raises:
      TorchFileError: the file is damaged.
    """
    size = int.from_bytes(mapped[:8], "little")
    start = 8 + size
    if size > min(budget.limits.header_bytes, len(mapped) - 8):
        raise TorchFileError(f"claims a header of {size:,} bytes")
    header = parse_json(mapped[8:start], budget, "the header")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise TorchFileError("the header's metadata are not a dictionary of texts")
    tensors, places = {}, []
    for name, entry in header.items():
        tensors[name], place = _tensor(mapped, start, name, entry, budget)
        places.append((*place, name))
    _check_places(places, len(mapped) - start)
    budget.allow_arrays(len(mapped))
    return tensors, metadata


def parse_json(data: bytes, budget: Budget, what: str) -> dict:
    """Return the JSON object in ``data``, charged to the budget, without repeated names."""
    budget.allow_pickle(len(data))
    budget.spend(len(data), 16 * len(data))

    def unique(pairs):
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise TorchFileError(f"{what} has a name twice")
        return entries

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except TorchFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TorchFileError(f"{what} is damaged: {printable(str(error))}") from None
    if type(value) is not dict:
        raise TorchFileError(f"{what} is a {describe(value)}, not a dictionary")
    return value


def _tensor(mapped, start, name, entry, budget):
    """Return (tensor, its place in bytes behind the header)."""
    budget.spend(_ENTRY)
    shown = printable(name)
    if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise TorchFileError(f"the header's entry of tensor {shown} is damaged")
    stored, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(stored) is not str:
        raise TorchFileError(f"tensor {shown} has the dtype {describe(stored)}")
    most = len(mapped) - start
    if (
        type(place) is not list
        or len(place) != 2
        or not all(type(at) is int for at in place)
        or not 0 <= place[0] <= place[1] <= most
    ):
        raise TorchFileError(
            f"tensor {shown} lies outside of the file's {most:,} bytes of tensors; is the download "
            "complete?"
        )
    begin, end = place
    if stored not in _NAMES:
        return InertObject(InertGlobal(f"safetensors.{stored}"), (tuple(place),)), (begin, end)
    dtype = DTYPES[_NAMES[stored]]
    storage = Storage(name, end - begin, dtype.itemsize)
    storage.read = lambda: np.frombuffer(mapped, np.uint8, end - begin, start + begin)
    try:
        source = TypedStorage(storage, dtype)
        tensor = make_tensor(source, 0, shape, _strides(shape), budget)
    except TorchFileError as error:
        raise TorchFileError(f"tensor {shown}: {error}") from None
    if tensor.nbytes != end - begin:
        raise TorchFileError(
            f"tensor {shown} of shape {tensor.shape} and dtype {dtype} has {tensor.nbytes:,} "
            f"bytes, the file {end - begin:,}"
        )
    return tensor, (begin, end)


def _strides(shape):
    """Return those of a C-contiguous array; for a shape that is none, anything."""
    if type(shape) is not list or len(shape) > 64 or not all(type(n) is int for n in shape):
        return shape
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        # Strides of empty tensors are not used.
        size = min(max(size * length, 0), 2**48 - 1)
    return strides[::-1]


def _check_places(places, size):
    """Refuse tensors that share bytes, and bytes that are no tensor's, as the format does."""
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            what = "shares bytes with another" if begin < at else "follows bytes of no tensor"
            raise TorchFileError(f"tensor {printable(name)} {what}")
        at = end
    if at != size:
        raise TorchFileError(
            f"its tensors have {at:,} bytes, the file {size:,}; is the download complete?"
        )


def find_index(path: str | os.PathLike) -> pathlib.Path | None:
    """Return the index of a state dict in shards, given it or its folder; None if it is not one."""
    path = pathlib.Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(found) > 1:
            names = ", ".join(printable(file.name) for file in found[:5])
            raise TorchFileError(f"{path}: has several indexes of shards, give one: {names}")
        return found[0] if found else None
    return path if path.name.endswith(INDEX_SUFFIX) else None


def read_index(path: pathlib.Path, budget: Budget) -> dict[str, list[str]]:
    """Return file name -> names of the tensors in it, of an index of shards.

    Raises:
      TorchFileError: the index is damaged, or names a file outside of its folder.
    """
    if path.stat().st_size > budget.limits.header_bytes:
        raise TorchFileError(f"an index of {path.stat().st_size:,} bytes")
    places = parse_json(path.read_bytes(), budget, "the index").get("weight_map")
    if type(places) is not dict or not places:
        raise TorchFileError("an index without weight_map, the names of its files")
    shards: dict[str, list[str]] = {}
    for name, file in places.items():
        if type(file) is not str or file != os.path.basename(file) or "\\" in file:
            raise TorchFileError(f"the file of {printable(name)} is {describe(file)}, not a name")
        if not file.endswith(".safetensors"):
            raise TorchFileError(f"the file of {printable(name)}, {printable(file)}, is no shard")
        shards.setdefault(file, []).append(name)
    if len(shards) > budget.limits.shards:
        raise TorchFileError(f"has {len(shards):,} shards, above {budget.limits.shards:,}")
    return shards


def write_safetensors(
    path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any layout, or nothing on an error; an existing file is replaced.

    In PyTorch, read it by ``safetensors.torch.load_file``.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with files.writing_whole(path) as unfinished:
        safetensors.numpy.save_file(arrays, os.fspath(unfinished), metadata=dict(metadata or {}))
