"""The parts of batch normalisation in XLA's form; ``training`` composes them."""

import jax
import jax.numpy as jnp
from jax import lax

ACTIVATIONS = {None: lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}


def wide(x: jax.Array) -> jax.Array:
    """Return x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def moments(sums: jax.Array, count: int, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Return mean and biased variance [C], from what ``channel_sums`` gives for ``count`` values.

    They are averaged over the devices of the mesh axis, if there is one.
    """
    means = sums / count
    if axis_name is not None:
        means = lax.pmean(means, axis_name)
    mean, mean_of_squares = means
    # Rounding may leave a tiny negative variance where all values are equal.
    return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0)


def normalize(x: jax.Array, mean: jax.Array, multiplier: jax.Array, bias: jax.Array) -> jax.Array:
    """Return ``(x - mean) * multiplier + bias`` in the dtype of the multiplier."""
    return (x.astype(multiplier.dtype) - mean) * multiplier + bias


def finish(
    y: jax.Array,
    activation: str | None = None,
    residual: jax.Array | None = None,
    branch_scale: jax.Array | None = None,
) -> jax.Array:
    """Return ``activation(branch_scale * y + residual)``, without what is None.

    Raises:
      ValueError: the activation is not in ``ACTIVATIONS``.
    """
    if residual is not None:
        y = scale_branch(y, branch_scale) + residual
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"batch_norm: activation must be one of {names}, not {activation!r}")
    return ACTIVATIONS[activation](y)


def scale_branch(z: jax.Array, branch_scale: jax.Array | None) -> jax.Array:
    """Multiply z [N, ...] by ``branch_scale`` [N], unless it is None."""
    if branch_scale is None:
        return z
    return z * branch_scale.astype(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))


def channel_sums(x: jax.Array) -> jax.Array:
    """Return the sums of x [..., C] and of its squares over all axes but the last, [2, C]."""
    return _sums(wide(x), wide(x))


def backward_sums(
    gradient: jax.Array,
    x: jax.Array,
    mean: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array,
    *,
    activation: str | None,
) -> jax.Array:
    """Return the sums of g and of g * (x - mean), [2, C].

    g is the gradient of the normalised x, and ``gradient`` that of its activation.
    """
    g = before_activation(gradient, x, mean, multiplier, bias, activation)
    return _sums(g, wide(x) - mean)


def before_activation(gradient, x, mean, multiplier, bias, activation):
    """Return g of ``backward_sums``, in at least float32."""
    z = normalize(x, mean, multiplier, bias)
    return jax.vjp(ACTIVATIONS[activation], z)[1](gradient.astype(z.dtype))[0]


def input_gradient(g, x, mean, multiplier, shift, slope):
    """Return ``multiplier * g + slope * (x - mean) + shift``, g being that of ``backward_sums``.

    It is the gradient of x, whose normalisation shifts and tilts it.
    """
    return multiplier * g + slope * (wide(x) - mean) + shift


def residual_backward_sums(
    gradient: jax.Array,
    x: jax.Array,
    output: jax.Array,
    mean: jax.Array,
    branch_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``backward_sums``, where ``output`` is the ReLU of a sum with a residual.

    Returns:
      The sums, and the gradient of the residual, like ``gradient``.
    """
    residual_gradient = jnp.where(output > 0, gradient, 0)
    g = scale_branch(wide(residual_gradient), branch_scale)
    return _sums(g, wide(x) - mean), residual_gradient


def _sums(a, b):
    axes = tuple(range(a.ndim - 1))
    return jnp.stack([a.sum(axes), (a * b).sum(axes)])
