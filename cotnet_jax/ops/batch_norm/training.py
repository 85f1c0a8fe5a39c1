"""Batch normalisation by a batch's own statistics, with a gradient in few passes over memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cotnet_jax.ops.batch_norm import plain
from cotnet_jax.ops.dispatch import check_implementation, dispatch, uses_kernels
from cotnet_jax.ops.varying import align

NAME = "batch_norm"
LAUNCH = "cotnet_jax.ops.batch_norm.triton.launch"


def batch_norm(
    x: Float[Array, "N *pixels C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    activation: str | None = None,
    residual: Float[Array, "N *pixels C"] | None = None,
    branch_scale: Float[Array, " N"] | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N *pixels C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalise x by its own mean and variance over all axes but the last, and activate it.

    Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, algorithm 1, and what follows it in
    a residual block: ``activation(branch_scale * y + residual)`` of the normalised y. Everything is
    computed in at least float32.

    On NVIDIA GPUs kernels take the sums of the statistics and of the gradient: the backward pass
    then reads x and the result's gradient twice, and writes the gradient of x, where XLA's form
    reads and writes eight arrays of their size.

    Args:
      x: [N, ..., C], any floating dtype.
      scale, bias: [C].
      activation: "relu", "silu" or None.
      residual: in the shape of x; None adds nothing.
      branch_scale: factor of each sample beside a residual, for stochastic depth; no gradient flows
        to it. None is 1.
      epsilon: added to the variance.
      axis_name: mesh axis over which the statistics are averaged; None keeps them per device.
      dtype: of the result; None takes that of x.
      implementation: as in ``local_aggregation``.

    Returns:
      The result [N, ..., C]; mean and biased variance [C], through which no gradient flows.

    Raises:
      ValueError, TypeError, ImportError: as ``local_aggregation``.
    """
    arrays = (x,) if residual is None else (x, residual)
    check_implementation(NAME, implementation, *arrays)
    # The kernel tells from a ReLU's result where it passes the gradient.
    kernel_suits = residual is None or activation == "relu"
    use_kernels = kernel_suits and uses_kernels(implementation, *arrays)
    options = (activation, epsilon, axis_name, jnp.dtype(dtype or x.dtype), implementation)
    function = _batch_norm if use_kernels else _plain
    branch_scale = lax.stop_gradient(branch_scale)
    y, mean, var = function(options, *align(x, scale, bias, residual, branch_scale))
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


def _plain(options, x, scale, bias, residual, branch_scale):
    """The composition that JAX differentiates by itself."""
    return finish(options, plain.channel_sums(x), x, scale, bias, residual, branch_scale)


def finish(options, sums, x, scale, bias, residual, branch_scale):
    """Return what ``batch_norm`` does, from x and what ``channel_sums`` gives for it."""
    activation, epsilon, axis_name, dtype, _ = options
    mean, var = plain.moments(sums, count(x), axis_name)
    y = plain.normalize(x, mean, scale * lax.rsqrt(var + epsilon), bias)
    return plain.finish(y, activation, residual, branch_scale).astype(dtype), mean, var


def count(x: jax.Array) -> int:
    """Return the number of values in each channel, on one device."""
    return x.size // x.shape[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(options, *operands):
    return _forward(options, *operands)[0]


def _forward(options, x, scale, bias, residual, branch_scale):
    sums = dispatch(LAUNCH, options[-1], "channel_sums", plain.channel_sums, x)
    y, mean, var = finish(options, sums, x, scale, bias, residual, branch_scale)
    y, output = store_sum(y, residual)
    return (y, mean, var), (x, mean, var, scale, bias, output, branch_scale)


def store_sum(y, residual):
    """Return y, and what the gradient needs of it: where there is a residual y itself, else None.

    The gradient of a sum's ReLU needs its result, which is kept anyway, in place of the residual.
    Without the barrier XLA computes the sums of all blocks of a stage again in each next one, from
    all that they are sums of, in float32.
    """
    if residual is None:
        return y, None
    y = lax.optimization_barrier(y)
    return y, y


def _backward(options, residuals, gradients):
    x, mean, _, _, bias, output, branch_scale = residuals
    g, parts = gradient_parts(options, gradients[0], *residuals)
    residual_gradient = None
    if output is None:
        g = plain.before_activation(g, x, mean, parts.multiplier, bias, options[0])
    else:
        residual_gradient = g
        g = plain.scale_branch(plain.wide(g), branch_scale)
    x_gradient = plain.input_gradient(g, x, mean, parts.multiplier, parts.shift, parts.slope)
    return (
        x_gradient.astype(x.dtype),
        parts.scale_gradient,
        parts.bias_gradient,
        residual_gradient,
        None if branch_scale is None else jnp.zeros_like(branch_scale),
    )


_batch_norm.defvjp(_forward, _backward)


class GradientParts(NamedTuple):
    """What a batch normalisation's gradients are made of, each [C].

    ``plain.input_gradient`` takes the first three.
    """

    multiplier: jax.Array
    slope: jax.Array
    shift: jax.Array
    scale_gradient: jax.Array
    bias_gradient: jax.Array


def gradient_parts(
    options, gradient, x, mean, var, scale, bias, output, branch_scale
) -> tuple[jax.Array, GradientParts]:
    """Return the gradient that g is computed from, and ``GradientParts``.

    The first is that of the activation; beside a residual, that of the residual. With m the means
    over a batch and r = 1 / sqrt(var + epsilon), the gradient of x is

        scale * r * (g - m(g) - (x - mean) * r^2 * m(g * (x - mean))).
    """
    activation, epsilon, axis_name, _, implementation = options
    rstd = lax.rsqrt(var + epsilon)
    multiplier = scale * rstd
    if output is None:
        sums = dispatch(
            *(LAUNCH, implementation, "backward_sums", plain.backward_sums),
            *(gradient, x, mean, multiplier, bias),
            activation=activation,
        )
    else:
        sums, gradient = dispatch(
            *(LAUNCH, implementation, "residual_backward_sums", plain.residual_backward_sums),
            *(gradient, x, output, mean, *(() if branch_scale is None else (branch_scale,))),
        )
    means = sums / count(x)
    if axis_name is not None:
        means = lax.pmean(means, axis_name)
    return gradient, GradientParts(
        multiplier,
        slope=-multiplier * jnp.square(rstd) * means[1],
        shift=-multiplier * means[0],
        scale_gradient=(sums[1] * rstd).astype(scale.dtype),
        bias_gradient=sums[0].astype(bias.dtype),
    )
