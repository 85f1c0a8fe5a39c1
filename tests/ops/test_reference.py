"""The NumPy references against loops over single products, and against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.ops.local_aggregation import plain, reference

# N, H, W, groups, share, weight channels, kernel size.
SHAPES = [(2, 5, 4, 1, 3, 2, 3), (1, 3, 4, 2, 2, 3, 5), (2, 2, 3, 2, 4, 1, 1)]


def inputs(shape):
    """Values, weights, gradient, scale, bias, output scale and shift."""
    n, h, w, groups, share, channels, size = shape
    random = np.random.default_rng(0)
    width, taps = groups * share * channels, (groups, size**2, channels)
    values = (n, h, w, width)
    shapes = (values, (n, h, w, *taps), values, taps, taps, (width,), (width,))
    return [random.standard_normal(each) for each in shapes]


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_equal_the_loops(shape):
    operands = inputs(shape)[:3]
    results = reference.local_aggregation(*operands), reference.loops(*operands)
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def composed(values, raw, scale, bias, *output):
    """Group normalisation, aggregation and activation, from their definitions."""
    axes = (1, 2, 4)
    normal = (raw - raw.mean(axes, keepdims=True)) / jnp.sqrt(raw.var(axes, keepdims=True) + 1e-5)
    y = plain.xla_forward(values, normal * scale + bias)
    return jax.nn.silu(output[0] * y + output[1]) if output else y


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_gradients_are_those_of_the_composition(shape, activated):
    values, raw, gradient, *parameters = inputs(shape)
    parameters = parameters[: 4 if activated else 2]
    results = reference.normalized_local_aggregation(values, raw, gradient, *parameters)
    with jax.enable_x64(True):
        value, pullback = jax.vjp(composed, *map(jnp.asarray, (values, raw, *parameters)))
        expected = [np.asarray(a) for a in (value, *pullback(jnp.asarray(gradient)))]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9)
