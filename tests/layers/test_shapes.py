"""The shapes in the annotations of layers, models and operations are checked while tests run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import cotnet_jax
from cotnet_jax.layers import BatchNorm, DropPath, SplitAttention, pooling
from cotnet_jax.ops import convolution

MISMATCH = jaxtyping.TypeCheckError


class Halving(nn.Module):
    """In place of a convolution: has lost every second row."""

    features: int
    kernel_size: int = 1
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        return jnp.zeros((x.shape[0], -(-x.shape[1] // 2), x.shape[2], self.features))


def test_an_argument_of_another_shape_is_caught():
    with pytest.raises(MISMATCH, match=r"parameter 'x'"):
        pooling.blur_pool(jnp.zeros((4, 4, 3)), 2)
    with pytest.raises(MISMATCH):
        cotnet_jax.CoTLayer().init(jax.random.key(0), jnp.zeros((4, 4, 16)))


def test_integers_are_caught():
    with pytest.raises(MISMATCH):
        BatchNorm().init(jax.random.key(0), jnp.zeros((2, 3), jnp.int32))


def test_a_result_of_another_shape_is_caught():
    layer = SplitAttention(conv=Halving)
    with pytest.raises(MISMATCH, match="return value"):
        layer.init(jax.random.key(0), jnp.zeros((2, 4, 4, 16)))


def test_results_are_caught_while_a_function_is_traced(monkeypatch):
    monkeypatch.setattr(convolution, "convolve", lambda x, kernel, **_: x[0, ..., :1])
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = cotnet_jax.create_model("cotnet_tiny")
    with pytest.raises(MISMATCH, match=r"layers.conv.Conv.convolve"):
        jax.eval_shape(model.init, jax.random.key(0), image)


def test_a_modules_attributes_are_checked():
    with pytest.raises(MISMATCH, match="rate"):
        DropPath("0.5")


def test_the_check_can_be_turned_off(unchecked_shapes):
    assert DropPath("0.5").rate == "0.5"
