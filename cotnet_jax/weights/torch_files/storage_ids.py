"""Persistent ids of a torch pickle: ("storage", type, key, location, elements[, view])."""

from collections.abc import Callable

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import printable
from cotnet_jax.weights.torch_files.pickle_machine import Constant, describe
from cotnet_jax.weights.torch_files.tensors import Storage, TypedStorage


class StorageIds:
    """Returns the TypedStorage of a persistent id; ids with the same key share a storage.

    Args:
      prepare: called once with each new storage, which it may refuse.
      with_view: whether ids have a sixth entry, as in the legacy format.
    """

    def __init__(self, prepare: Callable[[Storage], None], with_view: bool):
        self._prepare = prepare
        self._length = 6 if with_view else 5
        self.storages: dict[str, Storage] = {}

    def __call__(self, identifier) -> TypedStorage:
        if type(identifier) is not tuple or len(identifier) != self._length:
            raise TorchFileError(
                f"a persistent id must be a tuple of {self._length}, not a {describe(identifier)}"
            )
        tag, storage_type, key, _, elements, *view = identifier
        if tag not in ("storage", b"storage"):
            raise TorchFileError(f"a persistent id must name a storage, not a {describe(tag)}")
        if not isinstance(storage_type, Constant) or not storage_type.name.endswith("Storage"):
            raise TorchFileError(f"a storage of unknown type, {describe(storage_type)}")
        if type(key) is not str or len(key) > 64:
            raise TorchFileError(f"a storage's key must be a short str, not a {describe(key)}")
        if type(elements) is not int or not 0 <= elements < 2**48:
            raise TorchFileError(f"storage {printable(key)} claims an impossible size")
        if any(part is not None for part in view):
            raise TorchFileError("views of storages, written before PyTorch 0.4, are not supported")
        dtype = storage_type.value
        nbytes = elements * dtype.itemsize
        storage = self.storages.get(key)
        if storage is None:
            storage = self.storages[key] = Storage(key, nbytes, dtype.itemsize)
            self._prepare(storage)
        if storage.nbytes != nbytes:
            raise TorchFileError(
                f"storage {printable(key)} has {storage.nbytes:,} bytes and {nbytes:,}"
            )
        return TypedStorage(storage, dtype)
