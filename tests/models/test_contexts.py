"""The contexts and weights that cot_contexts returns are those that the layer computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cotnet_jax
from cotnet_jax.models.contexts import _natural_order, cot_contexts


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layers_result_follows_from_its_contexts(groups):
    layer = cotnet_jax.CoTLayer(groups=groups)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 32))
    variables = layer.init(jax.random.key(1), x)
    result, layers = cot_contexts(layer, variables, x)
    (contexts,) = layers.values()
    np.testing.assert_allclose(result, layer.apply(variables, x), rtol=1e-4, atol=1e-5)
    share = contexts.share[:, None, None]
    assert contexts.share.shape == (2, 32)
    expected = share * contexts.dynamic + (1 - share) * contexts.static
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert contexts.weights.shape == (2, 5, 4, groups, 3, 3, 32 // 8 // groups)


def test_the_weights_sum_a_pixels_surroundings():
    layer = cotnet_jax.CoTLayer()
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 32))
    variables = layer.init(jax.random.key(1), x)
    (contexts,) = cot_contexts(layer, variables, x)[1].values()
    # Statistics are still 0 and 1: each batch norm divides by sqrt(1 + epsilon) alone.
    scale = 1 / np.sqrt(1 + 1e-5)
    values = scale * x @ variables["params"]["value_conv"]["kernel"][0, 0]
    # Channel 9 has the weights at index 9 mod 4; the value up left of a pixel comes first.
    around = jnp.pad(values[1, :, :, 9], 1)[2:5, 1:4]
    total = scale * jnp.sum(contexts.weights[1, 2, 1, 0, :, :, 1] * around)
    np.testing.assert_allclose(contexts.dynamic[1, 2, 1, 9], jax.nn.silu(total), rtol=1e-4)


def test_layers_are_in_natural_order():
    names = ["stage1_block10/cot", "stage1_block9/cot", "stage0_block11/cot"]
    assert sorted(names, key=_natural_order) == [names[2], names[1], names[0]]


def test_a_network_with_other_layers_too():
    model = cotnet_jax.create_model("se_cotnetd_50", num_classes=4)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    _, layers = jax.eval_shape(lambda v, x: cot_contexts(model, v, x), variables, images)
    # Stages 1 and 2 have split attention, and so has every second block of stage 3.
    assert list(layers) == [
        *(f"stage3_block{block}/cot" for block in (0, 2, 4)),
        *(f"stage4_block{block}/cot" for block in (0, 1, 2)),
    ]
