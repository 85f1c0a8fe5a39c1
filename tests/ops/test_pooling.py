"""The poolings with gradients of their own, against XLA's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.ops import pooling

WINDOW = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
RANDOM = np.random.default_rng(0)


def both(function, x, gradient):
    y, pullback = jax.vjp(function, x)
    return y, pullback(gradient)[0]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6), (8, 8)])
@pytest.mark.parametrize(
    ("function", "reference"),
    [(pooling.max_pool, nn.max_pool), (pooling.average_pool, nn.avg_pool)],
)
def test_results_and_gradients_are_those_of_xla(function, reference, size):
    # Of so few different values many windows have several maxima: the first one gets the gradient.
    x = jnp.asarray(RANDOM.integers(0, 3, (2, *size, 5)), jnp.float32)
    gradient = jnp.asarray(RANDOM.standard_normal((2, -(-size[0] // 2), -(-size[1] // 2), 5)))
    expected = both(functools.partial(reference, **WINDOW), x, gradient)
    for got, wanted in zip(both(function, x, gradient), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_form_for_gpus_gives_the_same(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cpu, default: default(x))
    x = jnp.asarray(RANDOM.standard_normal((2, 7, 6, 5)), jnp.float32)
    np.testing.assert_array_equal(pooling.max_pool(x), nn.max_pool(x, **WINDOW))
    np.testing.assert_allclose(pooling.average_pool(x), nn.avg_pool(x, **WINDOW), atol=1e-6)


@pytest.mark.parametrize("function", [pooling.max_pool, pooling.average_pool])
def test_implementations_that_cannot_run(function):
    x = jnp.zeros((1, 2, 2, 1), jnp.int32)
    with pytest.raises(ValueError, match=f"{function.__name__}: implementation must be one of"):
        function(x, "cuda")
    with pytest.raises(TypeError, match=f"{function.__name__}: .*not int32"):
        function(x, "triton")


def test_nan_is_a_maximum():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan).at[0, 2, 2, 0].set(1)
    y, gradient = both(pooling.max_pool, x, jnp.ones((1, 2, 2, 1)))
    # The pixel at (1, 1) lies in all four windows.
    assert np.all(np.isnan(y))
    assert gradient[0, 1, 1, 0] == 4 == gradient.sum()


def test_short_floats_are_summed_in_float32():
    gradient = jnp.asarray([1.0, 2.0**-9], jnp.bfloat16).reshape(1, 1, 2, 1)
    x = jnp.zeros((1, 1, 3, 1), jnp.bfloat16)
    _, got = both(pooling.average_pool, x, gradient)
    assert got.dtype == jnp.bfloat16
    assert got[0, 0, 1, 0] == jnp.bfloat16((1 + 2.0**-9) / 9)
