"""Split attention of radix 1, the other spatial layer of SE-CoTNetD."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.layers.conv_norm import conv_norm


class SplitAttention(nn.Module):
    """Convolve 3x3, then gate every channel by a function of all channels' means.

    Zhang et al., "ResNeSt: Split-Attention Networks", arXiv 2004.08955, section 3.1, with one
    split, where the softmax over splits becomes a sigmoid::

        z = SiLU(BN(conv3x3(x)))
        y = z * sigmoid(conv1x1(SiLU(BN(conv1x1(mean over H, W of z)))))

    Attributes:
      strides: of the 3x3 convolution.
      dilation: of the 3x3 convolution.
      conv, norm: constructors of the convolutions and batch normalisations, for example
        ``functools.partial(Conv, dtype=jnp.bfloat16)``.
    """

    strides: int = 1
    dilation: int = 1
    conv: Callable[..., nn.Module] = Conv
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "N H W C"], train: bool = False
    ) -> Float[Array, "N -(-H//{self.strides}) -(-W//{self.strides}) C"]:
        """[N, H, W, C] -> [N, ceil(H / strides), ceil(W / strides), C]."""
        channels = x.shape[-1]
        norm = functools.partial(self.norm, use_running_average=not train)
        conv = self.conv(channels, 3, strides=self.strides, dilation=self.dilation, name="conv")
        z, _ = conv_norm(conv, norm(name="bn0"), x, activation="silu")
        gate = z.mean((1, 2), keepdims=True)
        conv = self.conv(max(channels // 4, 32), use_bias=True, name="fc1")
        gate, _ = conv_norm(conv, norm(name="bn1"), gate, activation="silu")
        gate = self.conv(channels, use_bias=True, name="fc2")(gate)
        gate = nn.sigmoid(gate.astype(jnp.promote_types(gate.dtype, jnp.float32)))
        return z * gate.astype(z.dtype)
