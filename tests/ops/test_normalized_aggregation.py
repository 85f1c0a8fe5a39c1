"""Fused normalisation and aggregation against the two done one after the other, by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.layers import BatchNorm, Conv, CoTLayer, WeightGroupNorm
from cotnet_jax.ops.local_aggregation import normalized_local_aggregation


@pytest.mark.parametrize(("groups", "train"), [(1, True), (2, True), (1, False)])
def test_cot_layer_is_the_same_with_and_without_fusion(groups, train):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3, 32)))
        double = functools.partial(functools.partial, dtype=jnp.float64, param_dtype=jnp.float64)
        modules = {"conv": double(Conv), "norm": double(BatchNorm)}
        modules["weight_norm"] = double(WeightGroupNorm)
        layers = [
            CoTLayer(groups=groups, key_groups=4 * groups, fused=fused, **modules)
            for fused in (True, False)
        ]
        variables, same = (layer.init(jax.random.key(0), x) for layer in layers)
        jax.tree.map(np.testing.assert_array_equal, variables, same)
        # Scales of 1, biases of 0 and statistics of both would hide most mistakes.
        random = np.random.default_rng(1)
        variables = jax.tree.map(lambda a: a + 0.3 * random.random(a.shape), variables)

        def loss(layer, params):
            y, _ = layer.apply(
                {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y))

        fused, separate = (
            jax.jit(jax.value_and_grad(functools.partial(loss, layer)))(variables["params"])
            for layer in layers
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
        jax.tree.map(close, fused, separate)


def test_weights_can_still_be_looked_at():
    x = jnp.ones((1, 4, 3, 16))
    layer = CoTLayer()
    variables = layer.init(jax.random.key(0), x)
    y, state = layer.apply(
        {c: variables[c] for c in ("params", "batch_stats")}, x, mutable=["intermediates"]
    )
    assert state["intermediates"]["aggregation_weights"][0].shape == (1, 4, 3, 1, 9, 2)
    np.testing.assert_allclose(
        y, layer.apply({c: variables[c] for c in ("params", "batch_stats")}, x), atol=1e-5
    )


def test_wrong_shapes_are_named(unchecked_shapes):
    values, weights = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 1, 9, 1))
    taps = jnp.ones((1, 9, 1))
    with pytest.raises(ValueError, match=r"scale must be \(1, 9, 1\), not \(9,\)"):
        normalized_local_aggregation(values, weights, jnp.ones(9), taps)
    with pytest.raises(ValueError, match=r"output_shift must be \(8,\), not None"):
        normalized_local_aggregation(values, weights, taps, taps, output_scale=jnp.ones(8))
