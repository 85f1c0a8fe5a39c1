"""Batch normalisation with the running statistics of the published models."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class BatchNorm(nn.Module):
    """Normalises every channel over all other axes.

    Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, algorithm 1. As in PyTorch the
    batch is normalised by the biased variance, and the running variance takes the unbiased one.
    Statistics are computed and kept in at least float32.

    Attributes:
      use_running_average: normalise by the running statistics, and leave them as they are.
      frozen: do so whatever ``use_running_average`` says, in training too; scale and bias remain
        parameters, with their gradients.
      momentum: share of the running statistics that an update keeps.
      epsilon: added to the variance.
      axis_name: mesh axis over which the batch's statistics are shared; None keeps them local.
      dtype: of the result.
      param_dtype: of scale, bias and running statistics.
      scale_init: initial scale.
    """

    use_running_average: bool = True
    frozen: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, fold: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[..., C] -> [..., C]; raises ValueError for a training batch of one value a channel.

        With ``fold``, which needs running statistics, the result is the pair (multiplier,
        shift), both [C], of the normalisation x * multiplier + shift; x gives its shape alone.
        """
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        running = self.use_running_average or self.frozen
        if running:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var, count = self._batch_statistics(x)
            if not self.is_initializing():
                unbiased = var * (count / (count - 1))
                for kept, batch in ((running_mean, mean), (running_var, unbiased)):
                    kept.value = self.momentum * kept.value + (1 - self.momentum) * batch
        multiplier = scale * lax.rsqrt(var + self.epsilon)
        if fold:
            if not running:
                raise ValueError("BatchNorm folds running statistics only, not those of a batch")
            return multiplier, bias - mean * multiplier
        y = (x.astype(multiplier.dtype) - mean) * multiplier + bias
        return y.astype(self.dtype)

    def _batch_statistics(self, x):
        """Mean and biased variance [C] in one pass over x, and the number of values in each."""
        count = x.size // max(x.shape[-1], 1)
        if self.axis_name is not None:
            count *= lax.axis_size(self.axis_name)
        if count < 2:
            raise ValueError(
                f"BatchNorm {'/'.join(self.path)} sees {count} value a channel in a training batch "
                f"of shape {x.shape}, where a variance needs two: give every device at least two "
                "images, or share the statistics over devices (sync_batch_norm)"
            )
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(x.ndim - 1))
        mean, mean_of_squares = x.mean(axes), jnp.square(x).mean(axes)
        if self.axis_name is not None:
            mean, mean_of_squares = lax.pmean((mean, mean_of_squares), self.axis_name)
        # Rounding may leave a tiny negative variance where all values are equal.
        return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0), count
