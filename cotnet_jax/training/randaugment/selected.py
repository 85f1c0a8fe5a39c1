"""Compute something for some rows of a batch, at the cost of these rows alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Rows at a time. The last part is filled up with rows whose results are not used.
_PART = 32


def replace_selected(
    values: jax.Array, selected: jax.Array, function: Callable[..., jax.Array], arguments: Any
) -> jax.Array:
    """Return ``values`` with the function's rows in place of the selected ones.

    Shapes are fixed: the rows are taken in parts of a fixed size, and only the number of parts
    depends on how many are selected.

    Args:
      values: [B, ...].
      selected: bool [B].
      function: rows of ``arguments`` -> rows of the shape and dtype of ``values``; each row depends
        on the same row of its arguments only.
      arguments: a tuple of trees of arrays [B, ...].
    """
    batch = len(selected)
    part = min(_PART, batch)
    order = jnp.argsort(~selected, stable=True)
    count = selected.sum()

    def replace_part(index: jax.Array, values: jax.Array) -> jax.Array:
        places = index * part + jnp.arange(part)
        rows = order[jnp.minimum(places, batch - 1)]
        new = function(*jax.tree.map(lambda a: a[rows], arguments))
        return values.at[jnp.where(places < count, rows, batch)].set(new, mode="drop")

    return jax.lax.fori_loop(0, -(-count // part), replace_part, values)
