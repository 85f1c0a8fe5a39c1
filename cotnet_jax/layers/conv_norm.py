"""A convolution and the batch normalisation after it, as one operation."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.ops.batch_norm import conv_kernels_suit
from cotnet_jax.ops.batch_norm.plain import finish


def conv_norm(
    conv: nn.Module,
    norm: nn.Module,
    x: Float[Array, "N H W in"],
    *,
    reuses_x: bool = False,
    **after: Any,
) -> tuple[Float[Array, "N H_out W_out out"], Float[Array, "N H W in"]]:
    """Return ``norm(conv(x), **after)``, and x.

    Running statistics scale the kernel and give the bias of one convolution, which on GPUs also
    adds a residual and applies a ReLU. In training, kernels for both run where they are faster.

    Args:
      conv, norm: modules, such as ``Conv`` and ``BatchNorm``; others are called with an array.
      x: the input.
      reuses_x: whether more is computed from x. It must be from the x that is returned, so that
        the two gradients are added where the first is made.
      **after: keyword arguments of a call of ``BatchNorm``.
    """
    if not (isinstance(conv, Conv) and isinstance(norm, BatchNorm) and conv.dtype == norm.dtype):
        return norm_act(norm, conv(x), **after), x
    if norm.uses_running_statistics:
        kernel, bias = conv.parameters(x.shape[-1])
        multiplier, shift = norm.scale_and_shift(conv.features)
        shift = shift if bias is None else bias * multiplier + shift
        y = conv.convolve(x, kernel * multiplier, shift)
        return finish(y, **after), x
    activation = after.get("activation")
    if conv.is_pointwise and conv_kernels_suit(
        norm.implementation, x, conv.features, conv.dtype, activation
    ):
        kernel, _ = conv.parameters(x.shape[-1])
        y, *rest = norm.of_product(
            x.astype(conv.dtype), kernel[0, 0].astype(conv.dtype), returns_x=reuses_x, **after
        )
        return y, rest[0] if reuses_x else x
    return norm_act(norm, conv(x), **after), x


def norm_act(norm: nn.Module, x: Float[Array, "*batch C"], **after: Any) -> Array:
    """Return ``norm(x, **after)``, for a normalisation that takes an array alone, too."""
    return norm(x, **after) if isinstance(norm, BatchNorm) else finish(norm(x), **after)
