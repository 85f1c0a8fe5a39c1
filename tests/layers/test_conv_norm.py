"""A convolution and its batch normalisation as one operation, against one after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.layers import BatchNorm, Conv, CoTLayer
from cotnet_jax.layers.conv_norm import conv_norm

RANDOM = np.random.default_rng(0)


class Pair(nn.Module):
    """A convolution and a batch norm, together or one after the other."""

    together: bool
    train: bool
    options: dict

    @nn.compact
    def __call__(self, x, residual=None, branch_scale=None):
        conv = Conv(8, **self.options, name="conv")
        norm = BatchNorm(use_running_average=not self.train, name="norm")
        after = {"activation": "relu", "residual": residual, "branch_scale": branch_scale}
        if self.together:
            y, x = conv_norm(conv, norm, x, reuses_x=True, **after)
        else:
            y = norm(conv(x), **after)
        return y, x


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 3, "groups": 2}, {"use_bias": True}, {"kernel_size": 3, "strides": 2}],
)
def test_together_is_one_after_the_other(options, train):
    x = jnp.asarray(RANDOM.standard_normal((3, 6, 5, 4)), jnp.float32)
    pair = functools.partial(Pair, train=train, options=options)
    variables = pair(False).init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + RANDOM.random(a.shape, np.float32), variables)
    shape = jax.eval_shape(pair(False, train=False).apply, variables, x)[0].shape
    residual = jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)
    branch_scale = jnp.asarray([0.0, 2.0, 1.0])

    def loss(params, x, together):
        (y, x), updates = pair(together).apply(
            {**variables, "params": params}, x, residual, branch_scale, mutable=["batch_stats"]
        )
        return jnp.sum(y**2) + jnp.sum(x**3), updates

    results = [
        jax.value_and_grad(functools.partial(loss, together=together), (0, 1), has_aux=True)(
            variables["params"], x
        )
        for together in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"kernel_size": 3, "use_bias": True}])
def test_further_channels_follow_those_of_the_input(options, norm, train):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, more=None):
            layers = Conv(6, **options, name="conv"), norm(not train, name="norm")
            y, same = conv_norm(*layers, x, more=more, activation="relu")
            assert same is x
            return y

    both = jnp.asarray(RANDOM.standard_normal((2, 4, 5, 12)), jnp.float32)
    variables = Net().init(jax.random.key(0), both)
    variables = jax.tree.map(lambda a: a + RANDOM.random(a.shape, np.float32), variables)
    apply = functools.partial(Net().apply, variables, mutable=["batch_stats"])
    got, wanted = apply(both[..., :4], both[..., 4:]), apply(both)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, wanted)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation must be one of None, 'relu', 'silu', not 'g"):
        BatchNorm().init(jax.random.key(0), jnp.zeros((2, 3)), activation="gelu")


def test_a_layer_takes_another_normalisation():
    x = jnp.asarray(RANDOM.standard_normal((2, 4, 4, 16)), jnp.float32)
    ours, others = CoTLayer(), CoTLayer(norm=functools.partial(nn.BatchNorm, momentum=0.9))
    variables = ours.init(jax.random.key(0), x, train=True)
    theirs = others.init(jax.random.key(0), x, train=True)
    expected, _ = ours.apply(variables, x, train=True, mutable=["batch_stats"])
    got, _ = others.apply(theirs, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
