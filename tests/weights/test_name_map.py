"""PyTorch's names and layouts, both ways. The values are tested by test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden

import cotnet_jax
from cotnet_jax.weights.name_map import torch_shapes

pytestmark = pytest.mark.end_to_end


def with_state_dict():
    return [name for name in cotnet_jax.list_models() if name not in NO_STATE_DICT]


NO_STATE_DICT = {"se_cotnetd_200", "se_cotnetd_270", "cotnet_tiny"}


@pytest.mark.parametrize("name", with_state_dict())
def test_names_and_shapes_are_those_of_the_published_models(name):
    expected = golden.state_dict_shapes(name)
    tracked = {n for n in expected if n.endswith("num_batches_tracked")}
    assert torch_shapes(name) == {n: s for n, s in expected.items() if n not in tracked}


@pytest.mark.parametrize(
    "name",
    [
        "cotnext50_2x48d",
        "se_cotnetd_50",
        # Deeper ones of the same blocks, which take ten seconds each.
        pytest.param("se_cotnetd_200", marks=pytest.mark.slow),
        pytest.param("se_cotnetd_270", marks=pytest.mark.slow),
    ],
)
def test_round_trip_is_bitwise(name):
    weights = golden.state_dict(torch_shapes(name), seed=7)
    variables = cotnet_jax.from_torch_state_dict(name, weights)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    model = cotnet_jax.create_model(name)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    back = cotnet_jax.to_torch_state_dict(name, variables)
    for tensor, value in weights.items():
        np.testing.assert_array_equal(back.pop(tensor), value)
    assert all(tensor.endswith("num_batches_tracked") for tensor in back)


def test_classes_and_channels_are_those_of_the_tensors():
    weights = golden.state_dict(torch_shapes("cotnet_tiny", channels=1, num_classes=5), seed=0)
    variables = cotnet_jax.from_torch_state_dict("cotnet_tiny", weights)
    model = cotnet_jax.create_model("cotnet_tiny", num_classes=5)
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, 32, 32, 1)))
    assert logits.shape == (2, 5)


def test_all_problems_are_listed_at_once_with_the_nearest_names():
    weights = golden.state_dict(torch_shapes("cotnet_tiny"), seed=0)
    weights["layer1.0.conv9.weight"] = weights.pop("layer1.0.conv1.weight")
    del weights["layer2.0.bn1.bias"]
    weights["fc.bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="4 problems") as error:
        cotnet_jax.from_torch_state_dict("cotnet_tiny", weights)
    for line in (
        "missing: layer1.0.conv1.weight (nearest: layer1.0.conv9.weight)",
        "missing: layer2.0.bn1.bias",
        "unexpected: layer1.0.conv9.weight (16, 32, 1, 1) (nearest: layer1.0.conv1.weight)",
        "misshapen: fc.bias is (3,), should be (1000,)",
    ):
        assert line in str(error.value)
