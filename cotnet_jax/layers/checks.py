"""The check of what a network or a layer is called with, before a convolution's error says less."""

from typing import Any

import jax.numpy as jnp


def check_array(array: Any, name: str, layout: str, to_floats: str) -> None:
    """Check that an argument is an array of floats with four axes.

    Args:
      array: the argument.
      name: what the user calls it.
      layout: its axes, such as "[N, H, W, C]".
      to_floats: what to type where it has integers.

    Raises:
      TypeError: it is no array, or not of floats.
      ValueError: it has not four axes.
    """
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(
            f"{name} must be {layout}, an array, not {type(array).__name__}: type "
            f"numpy.asarray({name})"
        )
    if len(array.shape) != 4:
        hint = f": type {name}[None] for a single image" if len(array.shape) == 3 else ""
        raise ValueError(f"{name} must be {layout}, not {tuple(array.shape)}{hint}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be {layout}, floats, not {array.dtype}: {to_floats}")
