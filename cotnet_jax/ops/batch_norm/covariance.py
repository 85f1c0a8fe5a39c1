"""A 1x1 convolution and its batch normalisation, by the covariance of the input.

Batch normalisation needs mean and variance of y = x @ w over all pixels. A product takes them over
from its input,

    mean(y) = mean(x) @ w        var(y) = diag(w^T cov(x) w),

so that both are known before y is, from one pass over x. The normalisation is then a factor of w
and a bias, and the product can add the residual and apply the ReLU while it is written: y itself is
neither stored nor read, forward or backward. Of 64 channels in and 256 out that halves the traffic.
What is lost is that statistics are those of the product before its rounding, and of the kernel
before that of its scaled form, both in the last bit of bfloat16.

The gradient needs g, that of the normalised y, only in x^T g and the sums of g: of the factor of w
and the bias. JAX differentiates what they are made of, down to the mean and the covariance of x,
whose gradients are a constant and a product of x in the gradient of x.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm import plain, training
from cotnet_jax.ops.convolution import convolve
from cotnet_jax.ops.dispatch import dispatch, uses_kernels
from cotnet_jax.ops.varying import align

LAUNCH = "cotnet_jax.ops.batch_norm.triton.covariance_launch"
# The kernels keep a block of rows with all channels in, and so many columns of the product, on a
# multiprocessor. XLA's form, by cuBLAS and cuDNN, is faster for more.
_MOST_CHANNELS_IN = 256


def covariance_suits(
    implementation: str | None,
    x: Float[Array, "N H W K"],
    channels: int,
    dtype: DTypeLike,
    activation: str | None,
) -> bool:
    """Return whether ``covariance_batch_norm`` should replace a convolution and ``batch_norm``.

    Args:
      implementation: as in ``local_aggregation``.
      x: the input.
      channels: those of the result; fewer than those of x are better normalised themselves.
      dtype: of the convolution and of the result.
      activation: after the normalisation.
    """
    return (
        jnp.dtype(dtype).itemsize == 2
        and activation in (None, "relu")
        and channels >= x.shape[-1] >= 16
        and all(size % 8 == 0 for size in (x.shape[-1], channels))
        and uses_kernels(implementation, x)
    )


def covariance_batch_norm(
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
    """As ``batch_norm`` of ``x @ kernel``, with statistics from the covariance of x.

    Args:
      x, residual: of one floating dtype, that of the result.
      kernel: in at least float32, better than rounded.
      scale, bias, activation, branch_scale, epsilon, axis_name, implementation: as in
        ``batch_norm``; the activation is "relu" or None, and more than 256 channels K have
        XLA's form.
      returns_x: return x as well, for what else is computed from it: the kernel then adds the
        gradient that comes through it.

    Returns:
      The result [N, H, W, C], mean and biased variance [C] of the product, and x if wanted.
    """
    if x.shape[-1] > _MOST_CHANNELS_IN:
        implementation = "xla"
    options = (activation, epsilon, axis_name, implementation)
    branch_scale = None if residual is None else lax.stop_gradient(branch_scale)
    operands = align(x, kernel, scale, bias, residual, branch_scale)
    y, mean, var, *rest = _normalize(options, returns_x, *operands)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var), *rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(options, returns_x, *operands):
    return _forward(options, returns_x, *operands)[0]


def _forward(options, returns_x, x, kernel, scale, bias, residual, branch_scale):
    activation, _, _, implementation = options
    moments = sums, products = dispatch(LAUNCH, implementation, "moments", xla_moments, x)
    scaled_kernel, shift, mean, var = _fold(options, x, sums, products, kernel, scale, bias)
    optional = [a for a in (residual, branch_scale) if a is not None]
    y = dispatch(
        *(LAUNCH, implementation, "affine", xla_affine),
        *(x, scaled_kernel.astype(x.dtype), shift, *optional),
        activation=activation,
        has_residual=residual is not None,
        scaled=branch_scale is not None,
    )
    y, _ = training.store_sum(y, residual)
    output = y if activation == "relu" else None
    outputs = (y, mean, var, x) if returns_x else (y, mean, var)
    return outputs, (x, moments, kernel, scale, bias, output, residual is not None, branch_scale)


def _fold(options, x, sums, products, kernel, scale, bias):
    """Return the kernel and the shift of the normalised product, and its mean and variance."""
    _, epsilon, axis_name, _ = options
    count = training.count(x)
    means = (sums / count, products / count)
    if axis_name is not None:
        means = lax.pmean(means, axis_name)
    x_mean, x_product = means
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    kernel = plain.wide(kernel)
    mean = dot(x_mean, kernel)
    covariance = x_product - jnp.outer(x_mean, x_mean)
    # Rounding may leave a tiny negative variance where all values are equal.
    var = jnp.maximum((kernel * dot(covariance, kernel)).sum(0), 0)
    multiplier = scale * lax.rsqrt(var + epsilon)
    return kernel * multiplier, bias - mean * multiplier, mean, var


def _backward(options, returns_x, residuals, gradients):
    implementation = options[-1]
    x, moments, kernel, scale, bias, output, has_residual, branch_scale = residuals
    gradient, _, _, *other = gradients
    scaled = branch_scale is not None
    scales = (branch_scale,) if scaled else ()
    fold = functools.partial(_fold, options, x)
    folded, pullback = jax.vjp(fold, *moments, kernel, scale, bias)
    sums, products, g = dispatch(
        *(LAUNCH, implementation, "gradient_products", xla_gradient_products),
        *(gradient, x, *(() if output is None else (output,)), *scales),
        masked=output is not None,
        scaled=scaled,
    )
    nothing = [jnp.zeros_like(a) for a in folded[2:]]
    sums_gradient, products_gradient, *parameter_gradients = pullback((products, sums, *nothing))
    x_gradient = dispatch(
        *(LAUNCH, implementation, "input_gradient", xla_input_gradient),
        *(g, x, folded[0].astype(x.dtype)),
        (products_gradient + products_gradient.T).astype(x.dtype),
        sums_gradient,
        *scales,
        *other,
        scaled=scaled,
        added=returns_x,
    )
    residual_gradient = g if has_residual else None
    branch_gradient = jnp.zeros_like(branch_scale) if scaled else None
    return x_gradient, *parameter_gradients, residual_gradient, branch_gradient


_normalize.defvjp(_forward, _backward)


def xla_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sums of x [..., K] over all axes but the last, and x^T x [K, K], in float32."""
    axes = tuple(range(x.ndim - 1))
    dtype = plain.wide(x[:0]).dtype
    products = jnp.tensordot(x, x, (axes, axes), preferred_element_type=dtype)
    return plain.wide(x).sum(axes), products


def xla_affine(
    x: jax.Array,
    kernel: jax.Array,
    shift: jax.Array,
    *optional: jax.Array,
    activation: str | None,
    has_residual: bool,
    scaled: bool,
) -> jax.Array:
    """Return ``activation(branch_scale * (x @ kernel + shift) + residual)``, in the dtype of x.

    With ``has_residual`` the residual follows, and with ``scaled``, beside it, the branch scale.
    """
    y = convolve(x, kernel[None, None])
    residual = optional[0] if has_residual else None
    if not scaled:
        # In this dtype cuDNN's convolution adds the shift and the residual, in float32.
        return plain.finish(y + shift.astype(x.dtype), activation, residual)
    y = plain.finish(plain.wide(y) + shift, activation, residual, optional[-1])
    return y.astype(x.dtype)


def xla_gradient_products(
    gradient: jax.Array, x: jax.Array, *optional: jax.Array, masked: bool, scaled: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the sums of g [C], x^T g [K, C], both in at least float32, and g.

    g is the gradient, with ``masked`` only where the output, which follows, is positive. With
    ``scaled`` the branch scale follows; the sums and products are then those of its multiple.
    """
    g = jnp.where(optional[0] > 0, gradient, 0) if masked else gradient
    branch = plain.scale_branch(g, optional[-1] if scaled else None)
    axes = tuple(range(x.ndim - 1))
    sums = plain.wide(branch).sum(axes)
    products = jnp.tensordot(x, branch, (axes, axes), preferred_element_type=sums.dtype)
    return sums, products, g


def xla_input_gradient(
    g: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    square: jax.Array,
    shift: jax.Array,
    *optional: jax.Array,
    scaled: bool,
    added: bool,
) -> jax.Array:
    """Return ``(branch_scale * g) @ kernel^T + x @ square + shift`` plus another array.

    With ``scaled`` the branch scale follows, and with ``added`` the other array.
    """
    y = jnp.dot(plain.scale_branch(g, optional[0] if scaled else None), kernel.T)
    y = (jnp.dot(x, square) + y) + shift.astype(x.dtype)
    return y + optional[-1] if added else y
