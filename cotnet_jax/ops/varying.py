"""The axes of an enclosing shard_map over which arrays vary, for functions with own gradients."""

from typing import Any

import jax
from jax import lax


def align(*arrays: Any) -> tuple[Any, ...]:
    """Make all arrays vary over the same axes of an enclosing shard_map; None stays None.

    The gradient of an array that did not vary is then summed over those axes, as it must be.
    """
    given = [a for a in arrays if a is not None]
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in given))
    return tuple(None if a is None else vary(a, varying) for a in arrays)


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark ``array`` as varying over ``axes`` of an enclosing shard_map."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array
