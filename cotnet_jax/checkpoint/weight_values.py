"""Check that the values of weights are numbers that a network can compute with.

The arrays are looked at, not the logits: XLA's code for CPUs can lose a NaN on its way through the
network, and an infinite running variance gives finite logits.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

# The last part of a running variance's name, here, in PyTorch and in Keras.
_VARIANCE = re.compile(r"(.*[./])?((running_)?var|moving_variance)")


class WeightValuesError(ValueError):
    """Some arrays hold no usable numbers; the message lists all of them."""


def check_weights(weights: Mapping[str, Any], dtype: DTypeLike = np.float32) -> None:
    """Check every array: floating, finite as ``dtype``, and no running variance negative.

    Args:
      weights: nested dicts of arrays, such as {"params", "batch_stats"}.
      dtype: the dtype that the network will compute with.

    Raises:
      WeightValuesError: lists all arrays that fail, with what is wrong, how often, and where first.
    """
    arrays = named_arrays(weights)
    raise_for([problem for name in arrays if (problem := find_problem(name, arrays[name], dtype))])


def find_problem(name: str, array: ArrayLike, dtype: DTypeLike = np.float32) -> str | None:
    """Return one line on what is wrong with an array of weights, None for nothing.

    Args:
      name: its name, here, in PyTorch or in Keras; the last part tells running variances.
      array: of any dtype.
      dtype: the dtype that the network will compute with.
    """
    array, dtype = np.asarray(array), np.dtype(dtype)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"{name}: {array.dtype}, which is not a floating-point type"
    with np.errstate(over="ignore"):
        values = array.astype(dtype, copy=False)
    is_variance = bool(_VARIANCE.fullmatch(name))
    if np.isfinite(values).all() and not (is_variance and (values < 0).any()):
        return None
    infinite = np.isinf(array)
    kinds = {
        "NaN": np.isnan(values),
        "infinite": infinite,
        f"too large for {dtype}": np.isinf(values) & ~infinite,
    }
    if is_variance:
        kinds["negative, which no variance is"] = np.isfinite(values) & (values < 0)
    return f"{name}: " + "; ".join(
        _count(kind, wrong) for kind, wrong in kinds.items() if wrong.any()
    )


def find_not_finite(tree: Any) -> list[str]:
    """Return a line for each floating array of a pytree that has a NaN or an infinity."""
    return [
        f"{name}: {_count('not finite', wrong)}"
        for name, array in named_arrays(tree).items()
        if jnp.issubdtype(array.dtype, jnp.floating)
        and (wrong := ~np.isfinite(np.asarray(array))).any()
    ]


def raise_for(problems: list[str]) -> None:
    """Raise WeightValuesError with one line for each of these problems, unless there are none."""
    if problems:
        arrays = "1 array" if len(problems) == 1 else f"{len(problems)} arrays"
        raise WeightValuesError(f"{arrays} of weights cannot be used:\n  " + "\n  ".join(problems))


def named_arrays(tree: Any) -> dict[str, Any]:
    """Return {"params/stem/conv1/kernel": array, ...} of a pytree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _count(kind: str, wrong: np.ndarray) -> str:
    count, first = np.count_nonzero(wrong), [int(i) for i in np.argwhere(wrong)[0]]
    where = f"the first at {first}" if count > 1 else f"at {first}"
    return f"{count:,} of {wrong.size:,} values {'are' if count > 1 else 'is'} {kind}, {where}"
