"""Group normalisation of aggregation weights, one group a weight channel."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class TapGroupNorm(nn.Module):
    """Normalises weights [N, H, W, G, K*K, Cw] over all pixels and taps.

    Wu and He, "Group Normalization", arXiv 1803.08494, equation 7, with a group for each of the
    G * Cw weight channels of an image. Scale and bias are per tap and weight channel, stored
    flat [G * K*K * Cw]. Statistics are biased and in at least float32.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: of scale and bias.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, weights: jax.Array, use: Callable | None = None) -> jax.Array:
        """[N, H, W, G, K*K, Cw] -> the same shape.

        With ``use`` the result is that of use(weights, scale, bias, epsilon=epsilon), scale and
        bias [G, K*K, Cw], which is to normalise the weights itself.
        """
        shape = weights.shape[3:]
        size = (shape[0] * shape[1] * shape[2],)
        scale = self.param("scale", nn.initializers.ones, size, self.param_dtype).reshape(shape)
        bias = self.param("bias", nn.initializers.zeros, size, self.param_dtype).reshape(shape)
        if use is not None:
            return use(weights, scale, bias, epsilon=self.epsilon)
        x = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        axes = (1, 2, 4)
        mean = x.mean(axes, keepdims=True)
        var = jnp.maximum(jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean), 0)
        y = (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype)
