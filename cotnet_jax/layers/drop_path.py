"""Stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class DropPath(nn.Module):
    """Leaves out a residual branch for some samples of a training batch.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 3; the samples
    that keep the branch are scaled by 1 / (1 - rate), so that evaluation needs no scaling.

    Attributes:
      rate: probability to leave out a sample's branch, below 1.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, ...] -> [N, ...]; takes the random stream "dropout" in training."""
        if not train or self.rate == 0:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(mask, x / keep, 0)
