"""Stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class DropPath(nn.Module):
    """Drop a residual branch for random samples of a training batch.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 3; the samples
    that keep the branch are scaled by 1 / (1 - rate), so that evaluation needs no scaling.

    Attributes:
      rate: probability of dropping a sample's branch, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "N ..."], train: bool = False) -> Float[Array, "N ..."]:
        """Return x, with some samples zero in training; they are drawn from the "dropout" RNG."""
        if not train or self.rate == 0:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(mask, x / keep, 0)
