"""Two-dimensional convolution, in the form that XLA compiles best on each platform."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.ops.space_to_depth import FEW_CHANNELS, space_to_depth_conv

# Channels that a step of cuDNN's bfloat16 kernels multiplies at least.
TILE_CHANNELS = 8


def convolve(
    x: Float[Array, "N H W in"],
    kernel: Float[Array, "K K in_of_group out"],
    *,
    strides: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, "N H_out W_out out"]:
    """Convolve x, padded with ``dilation * (K // 2)`` zeros on every side.

    On CPUs each channel group is convolved on its own, since XLA's gradient of the kernel of a
    grouped convolution was 50 times slower, and 1x1 convolutions are matrix products, which were up
    to 2.5 times as fast. Elsewhere, few channels with strides go through ``space_to_depth_conv``.
    On NVIDIA GPUs groups are joined where cuDNN is slow with them: those of 1x1 convolutions, and
    those whose channels do not fill its tensor cores' tiles.

    Args:
      x, kernel: of one floating dtype.
      strides, dilation: for rows and columns.
      groups: of channels.

    Returns:
      [N, ceil(H / strides), ceil(W / strides), out], for odd K.
    """
    whole = functools.partial(_convolve, strides=strides, dilation=dilation, groups=groups)
    pointwise = kernel.shape[0] == 1
    few = x.shape[-1] <= FEW_CHANNELS and strides > 1 and dilation == groups == 1
    elsewhere = functools.partial(space_to_depth_conv, strides=strides) if few else whole
    if not (pointwise or few or groups > 1):
        return whole(x, kernel)

    def on_cpu(x, kernel):
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        if pointwise:
            return _join([x[:, ::strides, ::strides] @ kernel[0, 0] for x, kernel in parts])
        return _join([_convolve(*part, strides=strides, dilation=dilation) for part in parts])

    def on_cuda(x, kernel):
        kernel = join_groups(kernel, groups, joined)
        return _convolve(x, kernel, strides=strides, dilation=dilation, groups=groups // joined)

    joined = _groups_to_join(kernel, groups)
    others = {"cuda": on_cuda} if joined > 1 else {}
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, **others, default=elsewhere)


def join_groups(
    kernel: Float[Array, "K K in_of_group out"], groups: int, joined: int
) -> Float[Array, "K K in_of_joined_groups out"]:
    """Return the kernel of the same convolution with ``joined`` neighbouring groups in one.

    Each channel's weights for the other groups of its own are zeros.
    """
    *size, channels, features = kernel.shape
    # [K, K, in_of_group, groups / joined, group of the output, its channels]
    parts = kernel.reshape(*size, channels, groups // joined, joined, features // groups)
    # [K, K, group of the input, in_of_group, ...]
    same_group = jnp.eye(joined, dtype=bool)[:, None, None, :, None]
    return jnp.where(same_group, parts[:, :, None], 0).reshape(*size, -1, features)


def _groups_to_join(kernel, groups) -> int:
    if kernel.shape[0] == 1:
        return groups
    fitting = (n for n in range(1, groups) if groups % n == 0)
    return next((n for n in fitting if n * kernel.shape[2] % TILE_CHANNELS == 0), groups)


def _convolve(x, kernel, *, strides, dilation, groups=1):
    padding = dilation * (kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _join(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
