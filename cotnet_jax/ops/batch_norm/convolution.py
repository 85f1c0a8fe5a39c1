"""A 1x1 convolution and the batch normalisation after it, with one gradient for both."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm import plain, training
from cotnet_jax.ops.dispatch import dispatch, uses_kernels
from cotnet_jax.ops.varying import align

# A program has all channels of the result in its registers, forward also those of the input.
_MOST_CHANNELS, _MOST_CHANNELS_IN = 64, 256


def conv_kernels_suit(
    implementation: str | None,
    x: Float[Array, "N H W K"],
    channels: int,
    dtype: DTypeLike,
    activation: str | None,
    more: Float[Array, "N H W more"] | None = None,
) -> bool:
    """Return whether ``conv_batch_norm`` should replace a convolution and ``batch_norm``.

    Args:
      implementation: as in ``local_aggregation``.
      x: the input.
      channels: those of the result.
      dtype: of the convolution and of the result.
      activation: after the normalisation.
      more: further channels of the input.
    """
    inputs = [x.shape[-1]] if more is None else [x.shape[-1], more.shape[-1]]
    return (
        jnp.dtype(dtype).itemsize == 2
        and activation in (None, "relu")
        and all(size >= 16 and size % 8 == 0 for size in (*inputs, channels))
        and channels <= _MOST_CHANNELS
        and sum(inputs) <= _MOST_CHANNELS_IN
        and uses_kernels(implementation, x)
    )


def conv_batch_norm(
    x: Float[Array, "N H W K"],
    kernel: Float[Array, "inputs C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    activation: str | None = None,
    more: Float[Array, "N H W more"] | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    implementation: str | None = None,
    returns_x: bool = False,
) -> tuple[Array, ...]:
    """As ``batch_norm`` of ``x @ kernel``, x being followed by ``more``, if there is any.

    On NVIDIA GPUs the statistics are summed while the product is written. In the backward pass the
    gradient of the product is formed as it is read, for the gradients of x and of the kernel
    together, and never stored.

    Args:
      x, more: of one floating dtype, that of the result.
      kernel: [K + more, C], rounded to that dtype.
      scale, bias, activation, epsilon, axis_name, implementation: as in ``batch_norm``; the
        activation is "relu" or None.
      returns_x: return x as well, for what else is computed from it: the kernel then adds the
        gradient that comes through it.

    Returns:
      The result [N, H, W, C], mean and biased variance [C] of the product, and x if wanted.
    """
    options = (activation, epsilon, axis_name, x.dtype, implementation)
    operands = align(x, kernel.astype(x.dtype), scale, bias, more)
    y, mean, var, *rest = _conv_batch_norm(options, returns_x, *operands)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var), *rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_batch_norm(options, returns_x, *operands):
    return _forward(options, returns_x, *operands)[0]


def _forward(options, returns_x, x, kernel, scale, bias, more):
    inputs = (x, kernel) if more is None else (x, kernel, more)
    y, sums = dispatch(training.LAUNCH, options[-1], "product", xla_product, *inputs)
    z, mean, var = training.finish(options, sums, y, scale, bias, None, None)
    outputs = (z, mean, var, x) if returns_x else (z, mean, var)
    return outputs, (x, kernel, y, mean, var, scale, bias, more)


def _backward(options, returns_x, residuals, gradients):
    activation, _, _, _, implementation = options
    x, kernel, y, mean, var, scale, bias, more = residuals
    gradient, _, _, *other = gradients
    _, parts = training.gradient_parts(options, gradient, y, mean, var, scale, bias, None, None)
    x_gradient, kernel_gradient, *more_gradient = dispatch(
        *(training.LAUNCH, implementation, "product_backward", xla_product_backward),
        *(gradient, y, x, kernel, mean, parts.multiplier, bias, parts.shift, parts.slope),
        *other,
        *(() if more is None else (more,)),
        activation=activation,
        added=returns_x,
        more=more is not None,
    )
    return (
        x_gradient,
        kernel_gradient.astype(kernel.dtype),
        parts.scale_gradient,
        parts.bias_gradient,
        None if more is None else more_gradient[0],
    )


_conv_batch_norm.defvjp(_forward, _backward)


def xla_product(
    x: jax.Array, kernel: jax.Array, more: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return ``x @ kernel`` and its ``plain.channel_sums``; more channels may follow those of x."""
    if more is not None:
        x = jnp.concatenate([x, more], axis=-1)
    y = jnp.dot(x, kernel)
    return y, plain.channel_sums(y)


def xla_product_backward(
    gradient: jax.Array,
    y: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    mean: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array,
    shift: jax.Array,
    slope: jax.Array,
    *optional: jax.Array,
    activation: str | None,
    added: bool,
    more: bool,
) -> tuple[jax.Array, ...]:
    """Return the gradients of x, in at least float32 of the kernel, and of more channels, if any.

    With ``added`` another gradient of x to add follows, and with ``more`` the further channels.

    That of ``y = x @ kernel`` is ``plain.input_gradient``, with g the ``gradient`` before the
    activation.
    """
    g = plain.before_activation(gradient, y, mean, multiplier, bias, activation)
    y_gradient = plain.input_gradient(g, y, mean, multiplier, shift, slope).astype(x.dtype)
    x_gradient = jnp.dot(y_gradient, kernel.T)
    more_gradient = []
    channels = x.shape[-1]
    if more:
        x = jnp.concatenate([x, optional[-1]], axis=-1)
        x_gradient, *more_gradient = jnp.split(x_gradient, [channels], axis=-1)
    if added:
        x_gradient += optional[0]
    axes = tuple(range(x.ndim - 1))
    kernel_gradient = jnp.tensordot(x, y_gradient, (axes, axes), preferred_element_type=mean.dtype)
    return x_gradient, kernel_gradient, *more_gradient
