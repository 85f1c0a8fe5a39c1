"""A 1x1 convolution and the batch normalisation after it, with one gradient for both."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm import plain, training
from cotnet_jax.ops.dispatch import dispatch, uses_kernels
from cotnet_jax.ops.varying import align

# The kernel's gradient stays in the registers of a multiprocessor: so many values, where both sizes
# are rounded up to powers of two.
_LARGEST_KERNEL = 64 * 256


def conv_kernels_suit(
    implementation: str | None,
    x: Float[Array, "N H W K"],
    channels: int,
    dtype: DTypeLike,
    activation: str | None,
) -> bool:
    """Return whether ``conv_batch_norm`` should replace a convolution and ``batch_norm``.

    Args:
      implementation: as in ``local_aggregation``.
      x: the input.
      channels: those of the result.
      dtype: of the convolution and of the result.
      activation: after the normalisation.
    """
    sizes = (x.shape[-1], channels)
    return (
        jnp.dtype(dtype).itemsize == 2
        and activation in (None, "relu")
        and all(size >= 16 and size % 8 == 0 for size in sizes)
        and math.prod(1 << (size - 1).bit_length() for size in sizes) <= _LARGEST_KERNEL
        and uses_kernels(implementation, x)
    )


def conv_batch_norm(
    x: Float[Array, "N H W K"],
    kernel: Float[Array, "K C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    activation: str | None = None,
    residual: Float[Array, "N H W C"] | None = None,
    branch_scale: Float[Array, " N"] | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    implementation: str | None = None,
    returns_x: bool = False,
) -> tuple[Array, ...]:
    """As ``batch_norm`` of ``x @ kernel``.

    On NVIDIA GPUs the statistics are summed while the product is written. In the backward pass the
    gradient of the product is formed as it is read, for the gradients of x and of the kernel
    together, and never stored.

    Args:
      x, kernel, residual: of one floating dtype, that of the result.
      scale, bias, activation, branch_scale, epsilon, axis_name, implementation: as in
        ``batch_norm``; the activation is "relu" or None, and "relu" beside a residual.
      returns_x: return x as well, for what else is computed from it: the kernel then adds the
        gradient that comes through it.

    Returns:
      The result [N, H, W, C], mean and biased variance [C] of the product, and x if wanted.
    """
    options = (activation, epsilon, axis_name, x.dtype, implementation)
    branch_scale = lax.stop_gradient(branch_scale)
    operands = align(x, kernel, scale, bias, residual, branch_scale)
    y, mean, var, *rest = _conv_batch_norm(options, returns_x, *operands)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var), *rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_batch_norm(options, returns_x, *operands):
    return _forward(options, returns_x, *operands)[0]


def _forward(options, returns_x, x, kernel, scale, bias, residual, branch_scale):
    y, sums = dispatch(training.LAUNCH, options[-1], "product", xla_product, x, kernel)
    z, mean, var = training.finish(options, sums, y, scale, bias, residual, branch_scale)
    z, output = training.store_sum(z, residual)
    outputs = (z, mean, var, x) if returns_x else (z, mean, var)
    return outputs, (x, kernel, y, mean, var, scale, bias, output, branch_scale)


def _backward(options, returns_x, residuals, gradients):
    activation, _, _, _, implementation = options
    x, kernel, y, mean, var, scale, bias, output, branch_scale = residuals
    gradient, _, _, *other = gradients
    g, parts = training.gradient_parts(
        options, gradient, y, mean, var, scale, bias, output, branch_scale
    )
    x_gradient, kernel_gradient = dispatch(
        *(training.LAUNCH, implementation, "product_backward", xla_product_backward),
        *(g, y, x, kernel, mean, parts.multiplier, bias, parts.shift, parts.slope),
        *(() if branch_scale is None else (branch_scale,)),
        *other,
        activation=activation if output is None else None,
        scaled=branch_scale is not None,
        added=returns_x,
    )
    return (
        x_gradient,
        kernel_gradient.astype(kernel.dtype),
        parts.scale_gradient,
        parts.bias_gradient,
        None if output is None else g,
        None if branch_scale is None else jnp.zeros_like(branch_scale),
    )


_conv_batch_norm.defvjp(_forward, _backward)


def xla_product(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``x @ kernel`` and its ``plain.channel_sums``."""
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
    scaled: bool,
    added: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and, in at least float32, of the kernel.

    With ``scaled`` the branch scale follows, and with ``added`` another gradient of x to add.

    That of ``y = x @ kernel`` is ``plain.input_gradient``, with g the ``gradient`` before the
    activation, times the branch scale.
    """
    g = plain.before_activation(gradient, y, mean, multiplier, bias, activation)
    if scaled:
        g = plain.scale_branch(g, optional[0])
    y_gradient = plain.input_gradient(g, y, mean, multiplier, shift, slope).astype(x.dtype)
    x_gradient = jnp.dot(y_gradient, kernel.T)
    if added:
        x_gradient += optional[-1]
    axes = tuple(range(x.ndim - 1))
    kernel_gradient = jnp.tensordot(x, y_gradient, (axes, axes), preferred_element_type=mean.dtype)
    return x_gradient, kernel_gradient
