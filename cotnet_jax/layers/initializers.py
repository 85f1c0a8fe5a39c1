"""Initial weights as the published models had them (PyTorch's definitions)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


def kaiming_normal_fan_out(
    key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Draw a kernel [K, K, in / groups, out], normal with variance 2 / (K*K * out).

    He et al., "Delving Deep into Rectifiers", arXiv 1502.01852, section 2.2, backward case.
    The output channels are not divided by the groups, as in the published models.
    """
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return math.sqrt(2 / fan_out) * jax.random.normal(key, shape, dtype)


def uniform_fan_in(fan_in: int) -> Callable[..., Float[Array, "..."]]:
    """Return an initializer uniform in +-1 / sqrt(fan_in).

    PyTorch's default for the biases of convolutions, and for linear layers.
    """
    bound = 1 / math.sqrt(fan_in)

    def initialize(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize
