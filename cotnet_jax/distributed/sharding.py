"""Devices: one mesh axis over all of them, state on each, the batch split between them."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
REPLICATED = PartitionSpec()
SPLIT = PartitionSpec(AXIS)


def make_mesh(devices=None) -> Mesh:
    """One axis, "data", over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def host_device() -> jax.Device:
    """This process's CPU, or its first device where JAX was told to use no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a whole copy of every array on every device; each process gives the same values."""
    sharding = NamedSharding(mesh, REPLICATED)

    def copy(array):
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(copy, tree)


def replicated_shapes(mesh: Mesh, tree: Any) -> Any:
    """What ``replicate`` would give for arrays of these shapes, as ``jax.ShapeDtypeStruct``s."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Joins each process's rows to a global batch, split over the devices by rows."""
    sharding = NamedSharding(mesh, SPLIT)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def prefetch_to_device(mesh: Mesh, batches: Iterable[Any], ahead: int = 1) -> Iterator[Any]:
    """Yields the batches split over the devices, ``ahead`` of them sent before they are asked for.

    The copies run while the devices work on the batch before.
    """
    queue = collections.deque()
    batches = iter(batches)
    while True:
        for batch in itertools.islice(batches, 1 + ahead - len(queue)):
            queue.append(shard_batch(mesh, batch))
        if not queue:
            return
        yield queue.popleft()


def device_copy(tree: Any) -> Any:
    """Inside shard_map: lets every device's copy of replicated arrays go its own way."""
    return jax.tree.map(lambda a: jax.lax.pcast(a, AXIS, to="varying"), tree)
