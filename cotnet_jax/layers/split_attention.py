"""Split attention of radix 1, the second kind of spatial layer in SE-CoTNetD."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv


class SplitAttention(nn.Module):
    """A 3x3 convolution whose channels are then gated from their means.

    Zhang et al., "ResNeSt: Split-Attention Networks", arXiv 2004.08955, section 3.1, with one
    split, where the softmax over splits becomes a sigmoid.

    Attributes:
      strides: step of rows and columns.
      dilation: distance of the convolution's neighbouring taps.
      conv, norm: convolution and batch normalisation, to bind dtypes with ``functools.partial``.
    """

    strides: int = 1
    dilation: int = 1
    conv: type[nn.Module] = Conv
    norm: type[nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] -> [N, ceil(H / strides), ceil(W / strides), C]."""
        channels = x.shape[-1]
        norm = functools.partial(self.norm, use_running_average=not train)
        z = self.conv(channels, 3, strides=self.strides, dilation=self.dilation, name="conv")(x)
        z = nn.silu(norm(name="bn0")(z))
        gate = z.mean((1, 2), keepdims=True)
        gate = self.conv(max(channels // 4, 32), use_bias=True, name="fc1")(gate)
        gate = nn.silu(norm(name="bn1")(gate))
        gate = self.conv(channels, use_bias=True, name="fc2")(gate)
        gate = nn.sigmoid(gate.astype(jnp.promote_types(gate.dtype, jnp.float32)))
        return z * gate.astype(z.dtype)
