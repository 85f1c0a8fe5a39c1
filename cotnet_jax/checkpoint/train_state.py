"""Everything that a training run needs to resume, in one pytree."""

from typing import Any

import flax
import jax
import optax


class TrainState(flax.struct.PyTreeNode):
    """The state of a run after ``step`` steps.

    Attributes:
      step: int32 [], optimizer steps done.
      params: nested dict of float32 arrays, the network's parameters.
      batch_stats: nested dict of float32 arrays, BatchNorm's running means and variances.
      ema: {"params", "batch_stats"}, the EMA of both; None when it is off.
      opt_state: the optax state.
      key: uint32 key data (``jax.random.key_data``) of the run's base key, constant over the run.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    ema: Any
    opt_state: optax.OptState
    key: jax.Array
