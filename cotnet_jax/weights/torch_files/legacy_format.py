"""The format of torch.save before PyTorch 1.6: five pickles, then the storages.

The pickles: magic number, protocol version, the writer's system, the object, and the keys of the
storages in order; each storage is an int64 count of elements and the elements, little-endian.
"""

import io
import mmap
from typing import Any

import numpy as np

from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.pickle_machine import PickleMachine, describe
from cotnet_jax.weights.torch_files.storage_ids import StorageIds
from cotnet_jax.weights.torch_files.torch_globals import GLOBALS

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_legacy(mapped: mmap.mmap, budget: Budget) -> tuple[Any, tuple[str, ...]]:
    """Return (value, names of inert globals) of a file in the legacy format.

    Raises:
      TorchFileError: the file is damaged, not written by torch.save, or claims more than it has.
    """

    def prepare(storage):
        # Its position is known once all storages are; its size can be checked now.
        if storage.nbytes > len(mapped):
            raise TorchFileError(
                f"storage {printable(storage.key)} claims {storage.nbytes:,} bytes, the file has "
                f"{len(mapped):,}"
            )

    ids = StorageIds(prepare, with_view=True)
    machine = PickleMachine(GLOBALS, ids, budget)
    stream = io.BytesIO(mapped[: budget.limits.pickle_bytes])
    # Where the pickles end is known afterwards; what follows them are the storages.
    budget.allow_pickle(len(stream.getbuffer()))
    if machine.load(stream) != MAGIC:
        raise TorchFileError("a pickle, but not one of torch.save: its magic number is missing")
    protocol = machine.load(stream)
    if protocol != PROTOCOL:
        raise TorchFileError(f"protocol {describe(protocol)}, not {PROTOCOL}")
    machine.load(stream)
    value = machine.load(stream)
    keys = machine.load(stream)
    _place(mapped, stream.tell(), keys, ids.storages)
    budget.allow_arrays(len(mapped))
    return value, tuple(machine.inert)


def _place(mapped, position, keys, storages):
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise TorchFileError("the list of storages is damaged")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise TorchFileError("the list of storages is not that of the tensors")
    for key in keys:
        storage = storages[key]
        nbytes = storage.nbytes
        start = position + 8
        if start + nbytes > len(mapped):
            raise TorchFileError(
                f"storage {printable(key)} should end at byte {start + nbytes:,}, the file has "
                f"{len(mapped):,}; is the download complete?"
            )
        elements = int.from_bytes(mapped[position:start], "little", signed=True)
        if elements * storage.itemsize != nbytes:
            raise TorchFileError(
                f"storage {printable(key)} has {elements:,} elements, its tensors say "
                f"{nbytes // storage.itemsize:,}"
            )
        storage.read = _reader(mapped, start, nbytes)
        position = start + nbytes
    if position != len(mapped):
        raise TorchFileError(f"{len(mapped) - position:,} bytes follow the last storage")


def _reader(mapped, start, nbytes):
    return lambda: np.frombuffer(mapped, np.uint8, nbytes, start)
