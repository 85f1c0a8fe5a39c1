"""The device mesh: one axis over all devices, the state replicated, the batch sharded."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
REPLICATED = PartitionSpec()
SHARDED = PartitionSpec(DATA_AXIS)


def make_mesh(devices=None) -> Mesh:
    """Return a mesh of one axis, "data", over ``devices``, by default all of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def host_device() -> jax.Device:
    """Return this process's CPU, or its first device where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a whole copy of every array on every device; each process gives the same values."""
    sharding = NamedSharding(mesh, REPLICATED)

    def copy(array):
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(copy, tree)


def replicate_abstract(mesh: Mesh, tree: Any) -> Any:
    """Return the ``jax.ShapeDtypeStruct``s of what ``replicate`` gives for such arrays."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Join each process's rows to a global batch, sharded over the devices by rows."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def prefetch_to_device(mesh: Mesh, batches: Iterable[Any], ahead: int = 1) -> Iterator[Any]:
    """Yield the sharded batches, with ``ahead`` more of them already on their way.

    They are copied while the devices work on the batch before.
    """
    queue: collections.deque[Any] = collections.deque()
    batches = iter(batches)
    while True:
        for batch in itertools.islice(batches, 1 + ahead - len(queue)):
            queue.append(shard_batch(mesh, batch))
        if not queue:
            return
        yield queue.popleft()


def make_varying(tree: Any) -> Any:
    """Inside shard_map, let each device's copy of replicated arrays vary from the others'."""
    return jax.tree.map(lambda a: jax.lax.pcast(a, DATA_AXIS, to="varying"), tree)
