"""The axes of an enclosing shard_map over which arrays vary, for functions with own gradients."""

import jax
from jax import lax


def align(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Make all arrays vary over the same axes of an enclosing shard_map.

    The gradient of an array that did not vary is then summed over those axes, as it must be.
    """
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    return tuple(vary(a, varying) for a in arrays)


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark ``array`` as varying over ``axes`` of an enclosing shard_map."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array
