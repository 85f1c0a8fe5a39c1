"""Grad-CAM against its definition, and on an image whose evidence is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cotnet_jax
from cotnet_jax.models.grad_cam import grad_cam


class Network(nn.Module):
    """A CoT layer, after which what follows is linear: its gradients are known."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(16, (1, 1), name="stem")(images)
        x = nn.relu(cotnet_jax.CoTLayer(name="cot")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def network():
    images = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    return Network(), Network().init(jax.random.key(1), images), images


def test_it_is_the_definition(network):
    model, variables, images = network
    classes = np.array([2, 0])

    def logits_from(contexts):
        head = variables["params"]["head"]
        return nn.relu(contexts).mean((1, 2)) @ head["kernel"] + head["bias"]

    _, layers = cotnet_jax.cot_contexts(model, variables, images)
    (layer,) = layers.values()
    share = layer.share[:, None, None]
    output = share * layer.dynamic + (1 - share) * layer.static
    gradient = jax.grad(lambda y: logits_from(y)[np.arange(2), classes].sum())(output)
    alpha = gradient.mean((1, 2))
    expected = np.maximum(np.einsum("nc,nhwc->nhw", alpha, output), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(
        grad_cam(model, variables, images, "cot", classes), expected, rtol=1e-3, atol=1e-6
    )


def test_the_likeliest_class_is_the_default_and_images_do_not_mix(network):
    model, variables, images = network
    likeliest = model.apply(variables, images).argmax(-1)
    maps = grad_cam(model, variables, images, "stem")
    given = grad_cam(model, variables, images, "stem", likeliest)
    np.testing.assert_allclose(maps, given, rtol=1e-4, atol=1e-6)
    alone = grad_cam(model, variables, images[1:], "stem")
    np.testing.assert_allclose(maps[1:], alone, rtol=1e-4, atol=1e-6)
    assert maps.shape == (2, 4, 5)


def test_it_points_at_the_evidence():
    class Brightness(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(2, name="head")(nn.Conv(1, (1, 1), name="conv")(images).mean((1, 2)))

    images = jnp.zeros((1, 6, 6, 1)).at[0, 1, 4].set(1)
    kernels = {"conv": jnp.ones((1, 1, 1, 1)), "head": jnp.array([[1.0, -1.0]])}
    params = {
        name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
        for name, kernel in kernels.items()
    }
    (bright,) = grad_cam(Brightness(), {"params": params}, images, "conv", np.array([0]))
    assert np.argwhere(bright > 0).tolist() == [[1, 4]]
    (dark,) = grad_cam(Brightness(), {"params": params}, images, "conv", np.array([1]))
    assert not np.any(dark > 0)


@pytest.mark.parametrize("layer", ["cto", "head", "", "cot/fusion"])
def test_a_layer_that_cannot_be_drawn_is_refused(network, layer):
    model, variables, images = network
    with pytest.raises(ValueError, match=r"no layer .*; near are '"):
        grad_cam(model, variables, images, layer)


def test_a_suggestion_is_the_layer_that_was_meant(network):
    model, variables, images = network
    with pytest.raises(ValueError, match=r"near are 'cot'"):
        grad_cam(model, variables, images, "cto")
