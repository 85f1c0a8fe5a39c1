"""Two-dimensional convolution with the padding and the initial weights of the published models."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.layers import initializers
from cotnet_jax.ops import convolution


class Conv(nn.Module):
    """Convolve [N, H, W, in], padded with ``dilation * (K // 2)`` zeros on every side.

    Parameters ``kernel`` [K, K, in / groups, features] and, with ``use_bias``, ``bias`` [features].

    Attributes:
      features: output channels.
      kernel_size: K, for rows and columns.
      strides: for rows and columns.
      groups: number of channel groups, each convolved on its own.
      dilation: distance between neighbouring kernel positions, in pixels.
      use_bias: add a bias, initially uniform in +-1 / sqrt(fan in).
      dtype: of the computation and the result.
      param_dtype: of kernel and bias.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __call__(
        self, x: Float[Array, "N H W in"]
    ) -> Float[Array, "N H_out W_out {self.features}"]:
        """[N, H, W, in] -> [N, ceil(H / strides), ceil(W / strides), features], for odd K."""
        return self.convolve(x, *self.parameters(x.shape[-1]))

    def convolve(
        self, x: Float[Array, "N H W in"], kernel: Array, bias: Array | None
    ) -> Float[Array, "N H_out W_out {self.features}"]:
        """As a call, with a kernel and a bias like the module's own ones."""
        y = convolution.convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides=self.strides,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else y + bias.astype(self.dtype)

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is the product of each pixel, or some, with one matrix."""
        return not self.use_bias and self.kernel_size == self.groups == 1

    @nn.compact
    def parameters(self, channels: int) -> tuple[Array, Array | None]:
        """Return kernel and bias for so many input channels; None for no bias."""
        size = (self.kernel_size, self.kernel_size)
        kernel = self.param(
            "kernel",
            initializers.kaiming_normal_fan_out,
            (*size, channels // self.groups, self.features),
            self.param_dtype,
        )
        if not self.use_bias:
            return kernel, None
        uniform = initializers.uniform_fan_in(channels // self.groups * self.kernel_size**2)
        return kernel, self.param("bias", uniform, (self.features,), self.param_dtype)
