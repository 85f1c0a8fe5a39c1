"""Stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm.plain import scale_branch


class DropPath(nn.Module):
    """Drop a residual branch for random samples of a training batch.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 3; the samples
    that keep the branch are scaled by 1 / (1 - rate), so that evaluation needs no scaling.

    Attributes:
      rate: probability of dropping a sample's branch, in [0, 1).
    """

    rate: float

    def __call__(self, x: Float[Array, "N ..."], train: bool = False) -> Float[Array, "N ..."]:
        """Return x, with some samples zero in training; they are drawn from the "dropout" RNG."""
        return scale_branch(x, self.branch_scale(x, train))

    @nn.compact
    def branch_scale(
        self, x: Float[Array, "N ..."], train: bool = False
    ) -> Float[Array, " N"] | None:
        """Return the factors of the samples of x, float32; None where all are 1."""
        if not train or self.rate == 0:
            return None
        keep = 1 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape[:1])
        return jnp.where(mask, jnp.float32(1 / keep), 0)
