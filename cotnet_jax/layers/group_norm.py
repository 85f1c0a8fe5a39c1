"""Group normalisation of aggregation weights, with one group per weight channel."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class WeightGroupNorm(nn.Module):
    """Normalise aggregation weights [N, H, W, G, K*K, Cw] over pixels and kernel positions.

    Wu and He, "Group Normalization", arXiv 1803.08494, equation 7, where each of the G * Cw weight
    channels of an image is a group. Statistics are biased, and computed in at least float32.

    Parameters ``scale`` and ``bias``, one value per kernel position and weight channel, stored flat
    [G * K*K * Cw].

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: of scale and bias.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __call__(self, weights: Float[Array, "N H W G KK Cw"]) -> Float[Array, "N H W G KK Cw"]:
        """Return the normalised weights in ``dtype``."""
        scale, bias = self.scale_and_bias(weights.shape[3:])
        x = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        axes = (1, 2, 4)
        mean = x.mean(axes, keepdims=True)
        # Rounding may leave a tiny negative variance where all weights are equal.
        var = jnp.maximum(jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean), 0)
        y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype)

    @nn.compact
    def scale_and_bias(
        self, shape: tuple[int, ...]
    ) -> tuple[Float[Array, "G KK Cw"], Float[Array, "G KK Cw"]]:
        """Return scale and bias in ``shape`` (G, K*K, Cw).

        For kernels that apply the normalisation themselves, such as
        ``normalized_local_aggregation``.
        """
        size = (shape[0] * shape[1] * shape[2],)
        scale = self.param("scale", nn.initializers.ones, size, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, size, self.param_dtype)
        return scale.reshape(shape), bias.reshape(shape)
