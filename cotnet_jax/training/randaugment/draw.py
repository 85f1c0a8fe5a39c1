"""Draw the operations of RandAugment for a batch."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.data.randaugment import (
    MAX_MAGNITUDE,
    OP_NAMES,
    PROBABILITY_RANGE,
    SIGNED,
    RandAugment,
    operation_value,
)

# Index of no operation.
NONE = -1
# Magnitudes are rounded to 1/256, a hundredth of the recipe's standard deviation, so that what they
# mean can be read from a table that the host's own formulas filled in double precision.
_STEPS_PER_MAGNITUDE = 256


class Operations(NamedTuple):
    """An operation for each of B images, with all its random parameters drawn.

    Attributes:
      op: int32 [B], its index in ``OP_NAMES``, or ``NONE``.
      value: float32 [B], as ``operation_value``, with its sign; 0 for ``NONE``.
      center_xy: float32 [B, 2], centre of Cutout's square in pixels.
    """

    op: jax.Array
    value: jax.Array
    center_xy: jax.Array


def is_any_of(operations: Operations, names: Sequence[str]) -> jax.Array:
    """Return which operations are one of these, bool [B]."""
    indices = jnp.asarray([OP_NAMES.index(name) for name in names])
    return (operations.op[:, None] == indices).any(axis=1)


def draw(key: jax.Array, batch: int, height: int, width: int, settings: RandAugment) -> Operations:
    """Draw ``settings.num_ops`` operations for each image.

    Args:
      key: random key.
      batch, height, width: of the images.
      settings: magnitude and number of operations.

    Returns:
      Operations of arrays [num_ops, B, ...], in the order in which they are applied.
    """
    keys = jax.random.split(key, settings.num_ops)
    return jax.vmap(lambda key: _draw_one(key, batch, height, width, settings))(keys)


def _draw_one(
    key: jax.Array, batch: int, height: int, width: int, settings: RandAugment
) -> Operations:
    keys = jax.random.split(key, 6)
    index = jax.random.randint(keys[0], (batch,), 0, len(OP_NAMES))
    low, high = PROBABILITY_RANGE
    probability = jax.random.uniform(keys[1], (batch,), minval=low, maxval=high)
    applied = jax.random.uniform(keys[2], (batch,)) < probability
    normal = jax.random.normal(keys[3], (batch,))
    magnitude = settings.magnitude + settings.magnitude_std * normal
    level = jnp.rint(magnitude.clip(0, MAX_MAGNITUDE) * _STEPS_PER_MAGNITUDE).astype(jnp.int32)
    is_signed = jnp.asarray([name in SIGNED for name in OP_NAMES])[index]
    negative = is_signed & jax.random.bernoulli(keys[4], 0.5, (batch,))
    value = jnp.asarray(_values())[index, level]
    sides = jnp.asarray([width, height], jnp.float32)
    return Operations(
        op=jnp.where(applied, index, NONE),
        value=jnp.where(applied, jnp.where(negative, -value, value), 0),
        center_xy=jax.random.uniform(keys[5], (batch, 2)) * sides,
    )


@functools.cache
def _values() -> np.ndarray:
    """The value of every operation for every magnitude, float32 [operations, magnitudes]."""
    steps = range(round(MAX_MAGNITUDE * _STEPS_PER_MAGNITUDE) + 1)
    return np.array(
        [[operation_value(name, n / _STEPS_PER_MAGNITUDE) for n in steps] for name in OP_NAMES],
        np.float32,
    )
