"""Two-dimensional convolution with the padding and the initial weights of the published models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotnet_jax.layers import initializers


class Conv(nn.Module):
    """Convolution over [N, H, W, in] that pads a K x K kernel by ``dilation * (K // 2)``.

    Attributes:
      features: output channels.
      kernel_size: K.
      strides: step of rows and columns.
      groups: channel groups that are convolved apart.
      dilation: distance of neighbouring taps.
      use_bias: adds a bias, initially uniform in +-1 / sqrt(fan in).
      dtype: of the computation and the result.
      param_dtype: of the parameters.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1
    groups: int = 1
    dilation: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, ceil(H / strides), ceil(W / strides), features]."""
        size = (self.kernel_size, self.kernel_size)
        fan_in = x.shape[-1] // self.groups * self.kernel_size**2
        kernel = self.param(
            "kernel",
            initializers.kaiming_normal_fan_out,
            (*size, x.shape[-1] // self.groups, self.features),
            self.param_dtype,
        )
        y = self._convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param(
                "bias", initializers.uniform_fan_in(fan_in), (self.features,), self.param_dtype
            )
            y += bias.astype(self.dtype)
        return y

    def _convolve(self, x, kernel):
        padding = self.dilation * (self.kernel_size // 2)

        def convolve(x, kernel, groups=1):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.strides, self.strides),
                padding=[(padding, padding)] * 2,
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        def convolve_each_group(x, kernel):
            parts = zip(
                jnp.split(x, self.groups, axis=-1),
                jnp.split(kernel, self.groups, axis=-1),
                strict=True,
            )
            return jnp.concatenate([convolve(*part) for part in parts], axis=-1)

        if self.groups == 1:
            return convolve(x, kernel)
        # On CPUs XLA's gradient of a grouped kernel was 50 times as slow as the groups' own.
        return jax.lax.platform_dependent(
            x,
            kernel,
            cpu=convolve_each_group,
            default=functools.partial(convolve, groups=self.groups),
        )
