"""The local aggregation op against its definition, written as plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import cotnet_jax
from cotnet_jax.ops.local_aggregation import reference

SHAPES = [
    # N, H, W, C, groups, share, kernel size
    (2, 5, 7, 48, 1, 8, 3),
    (1, 1, 1, 8, 1, 8, 3),
    (3, 1, 6, 8, 1, 8, 3),
    (2, 4, 1, 96, 2, 8, 3),
    (2, 3, 5, 96, 2, 8, 5),
    (1, 4, 4, 48, 1, 8, 1),
    (1, 2, 3, 8, 2, 2, 5),
    (0, 4, 4, 8, 1, 8, 3),
]


def inputs(shape, seed=0):
    n, h, w, c, groups, share, size = shape
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((n, h, w, c)),
        random.standard_normal((n, h, w, groups, size**2, c // groups // share)),
        random.standard_normal((n, h, w, c)),
    )


def value_and_gradients(values, weights, gradient):
    output, pullback = jax.vjp(cotnet_jax.local_aggregation, values, weights)
    return output, *pullback(gradient)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loops_in_float64(shape):
    arrays = inputs(shape)
    with jax.enable_x64(True):
        results = value_and_gradients(*map(jnp.asarray, arrays))
        for result, expected in zip(results, reference.loops(*arrays), strict=True):
            assert result.dtype == jnp.float64
            np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_low_precision_is_near_float64(shape, dtype, tolerance):
    arrays = [jnp.asarray(a, dtype) for a in inputs(shape)]
    results = value_and_gradients(*arrays)
    exact = reference.loops(*(np.asarray(a, np.float64) for a in arrays))
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == dtype
        error = np.linalg.norm(np.asarray(result, np.float64) - expected)
        assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_agree_with_finite_differences(shape, unchecked_shapes):  # by NumPy arrays
    with jax.enable_x64(True):
        values, weights, _ = map(jnp.asarray, inputs(shape))
        check_grads(cotnet_jax.local_aggregation, (values, weights), order=1, modes=["rev"])


def test_works_under_vmap_and_remat():
    values, weights, gradient = map(jnp.asarray, inputs(SHAPES[0]))
    expected = value_and_gradients(values, weights, gradient)
    each = [a[:, None] for a in (values, weights, gradient)]
    for result, whole in zip(jax.vmap(value_and_gradients)(*each), expected, strict=True):
        np.testing.assert_allclose(result[:, 0], whole, rtol=1e-5, atol=1e-5)
    op = jax.checkpoint(cotnet_jax.local_aggregation)
    np.testing.assert_allclose(op(values, weights), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ((2, 4, 4, 16), (2, 4, 5, 1, 9, 2), "N, H, W differ"),
        ((2, 4, 4, 16), (2, 4, 4, 1, 8, 2), "8 taps are not the square of an odd"),
        ((2, 4, 4, 16), (2, 4, 4, 1, 4, 2), "4 taps are not the square of an odd"),
        ((2, 4, 4, 16), (2, 4, 4, 1, 9, 3), "16 channels are not a multiple"),
        ((2, 4, 4, 16), (2, 4, 4, 9, 2), "takes values"),
    ],
)
def test_shapes_that_do_not_belong_together(values, weights, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        cotnet_jax.local_aggregation(jnp.zeros(values), jnp.zeros(weights))


def test_integers_are_refused(unchecked_shapes):
    with pytest.raises(TypeError, match="values must be floating point, not int32"):
        cotnet_jax.local_aggregation(
            jnp.zeros((1, 2, 2, 8), jnp.int32), jnp.zeros((1, 2, 2, 1, 9, 1))
        )
