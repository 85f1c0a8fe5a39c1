"""A convolution and the batch normalisation after it, as one operation."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.conv import Conv
from cotnet_jax.ops.batch_norm import conv_kernels_suit, covariance_suits
from cotnet_jax.ops.batch_norm.plain import finish
from cotnet_jax.ops.dispatch import uses_kernels


def conv_norm(
    conv: nn.Module,
    norm: nn.Module,
    x: Float[Array, "N H W in"],
    *,
    reuses_x: bool = False,
    more: Float[Array, "N H W more"] | None = None,
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
      more: further channels of the input, after those of x.
      **after: keyword arguments of a call of ``BatchNorm``.
    """
    after = {name: value for name, value in after.items() if value is not None}
    whole = x if more is None else jnp.concatenate([x, more], axis=-1)
    if not (isinstance(conv, Conv) and isinstance(norm, BatchNorm) and conv.dtype == norm.dtype):
        return norm_act(norm, conv(whole), **after), x
    if norm.uses_running_statistics:
        kernel, bias = conv.parameters(whole.shape[-1])
        multiplier, shift = norm.scale_and_shift(conv.features)
        shift = shift if bias is None else bias * multiplier + shift
        y = conv.convolve(whole, kernel * multiplier, shift)
        return finish(y, **after), x
    if not conv.is_pointwise or (conv.strides > 1 and (reuses_x or more is not None)):
        return norm_act(norm, conv(whole), **after), x
    product_of = x[:, :: conv.strides, :: conv.strides]
    request = (norm.implementation, product_of, conv.features, conv.dtype, after.get("activation"))
    options = {"returns_x": reuses_x, **after}
    if more is None and covariance_suits(*request):
        options |= {"by_covariance": True}
    elif conv.strides == 1 and after.keys() <= {"activation"} and conv_kernels_suit(*request, more):
        options |= {} if more is None else {"more": more.astype(conv.dtype)}
    else:
        return norm_act(norm, _convolve(conv, norm, whole, x, more), **after), x
    kernel, _ = conv.parameters(whole.shape[-1])
    y, *rest = norm.of_product(product_of.astype(conv.dtype), kernel[0, 0], **options)
    return y, rest[0] if reuses_x else x


def _convolve(conv, norm, whole, x, more):
    """Convolve the whole input, which is x, or x and more channels.

    On GPUs the sum of two products is faster than one of a concatenation, which must be written.
    """
    short = jnp.dtype(conv.dtype).itemsize == 2
    if more is None or not (short and uses_kernels(norm.implementation, x)):
        return conv(whole)
    kernel, _ = conv.parameters(whole.shape[-1])
    first, second = jnp.split(kernel, [x.shape[-1]], axis=2)
    return conv.convolve(x, first, None) + conv.convolve(more, second, None)


def norm_act(norm: nn.Module, x: Float[Array, "*batch C"], **after: Any) -> Array:
    """Return ``norm(x, **after)``, for a normalisation that takes an array alone, too."""
    return norm(x, **after) if isinstance(norm, BatchNorm) else finish(norm(x), **after)
