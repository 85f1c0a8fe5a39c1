"""MFU: the products that a step needs, by the peak of the devices."""

import jax
import jax.numpy as jnp
import pytest
from helpers.small_network import create_small, short_digits_config

from cotnet_jax.training import setup, utilization
from cotnet_jax.training.utilization import Utilization, count_products, flops_per_image

# Of the small network and one image of 8 x 8: its convolution of stride 4, and its classifier.
CONV, HEAD = 2 * 2 * 128 * 3 * 3 * 3, 128 * 10


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(setup, "create_model", create_small)
    return short_digits_config()


def test_a_step_has_the_products_of_what_is_trained(config):
    """The gradient of the images is not needed, nor anything before a frozen layer."""
    config.data.fake = True
    for freeze, products in (
        ("", 2 * CONV + 3 * HEAD),
        ("head", 2 * CONV + 2 * HEAD),
        ("conv|bn", CONV + 2 * HEAD),
    ):
        config.finetune.freeze = freeze
        assert flops_per_image(setup.set_up_training(config)) == 2 * products


def test_strides_and_groups_add_nothing_to_a_gradient():
    """Its convolutions have zeros between the pixels, or the groups in the batch."""

    def loss(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        ).sum()

    images, kernel = jnp.zeros((5, 8, 8, 16)), jnp.zeros((3, 3, 4, 24))
    forward = 5 * 4 * 4 * 24 * 3 * 3 * 4
    assert count_products(jax.make_jaxpr(loss)(images, kernel).jaxpr) == forward
    gradients = jax.make_jaxpr(jax.grad(loss, (0, 1)))(images, kernel)
    assert count_products(gradients.jaxpr) == 3 * forward


@pytest.mark.slow
def test_a_cotnet_takes_three_times_its_forward_pass(config, monkeypatch):
    monkeypatch.undo()
    config.model.name, config.data.image_size = "cotnet_tiny", 32
    training = setup.set_up_training(config)
    images = jnp.zeros((1, 32, 32, 3))
    forward = jax.make_jaxpr(training.model.apply)(training.variable_shapes, images)
    ratio = flops_per_image(training) / (2 * count_products(forward.jaxpr))
    assert 2.9 < ratio < 3


def test_it_is_of_the_peak_of_all_devices(config, monkeypatch):
    config.data.fake = True
    config.init_from, config.finetune.head_only_steps = "given", 4
    training = setup.set_up_training(config)
    devices = training.mesh.size
    monkeypatch.setitem(utilization.PEAKS, jax.devices()[0].device_kind, 1e9)
    run = Utilization(training)
    assert run.measured(1, {}) == {}
    for step, products in ((4, CONV + 2 * HEAD), (5, 2 * CONV + 3 * HEAD)):
        expected = {"mfu": 1000 * 2 * products / (1e9 * devices)}
        assert run.measured(step, {"images_per_second": 1000.0}) == pytest.approx(expected)


def test_without_a_known_peak_there_is_none(config, monkeypatch):
    training, lines = setup.set_up_training(config), []
    monkeypatch.setattr(utilization.logging, "info", lambda text, *args: lines.append(text % args))
    run = Utilization(training)
    assert run.measured(1, {"images_per_second": 1000.0}) == {}
    assert lines == ["No MFU is logged: the peak of cpu is not known."]
