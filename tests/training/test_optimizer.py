"""The recipe's learning rates and its SGD."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import cotnet_jax
from configs import default
from cotnet_jax.training import optimizer
from cotnet_jax.training.optimizer import make_optimizer

PEAKS = {"cotnet50": 0.25, "cotnext50_2x48d": 0.2, "cotnet101": 0.175}


def test_learning_rates_of_every_epoch(goldens):
    expected = json.loads((goldens / "lr_per_epoch.json").read_text())
    for model, rates in expected.items():
        schedule = default.get_config().schedule
        schedule.peak = PEAKS[model]
        ours = optimizer.learning_rates(schedule, 350, batch_size=640, warmup=5)
        np.testing.assert_allclose(ours, rates, rtol=1e-13)


def test_learning_rates_scale_with_the_batch_on_request():
    schedule = default.get_config().schedule
    rates_of = functools.partial(optimizer.learning_rates, schedule, 20, warmup=5)
    rates = rates_of(batch_size=640)
    np.testing.assert_array_equal(rates_of(batch_size=160), rates)
    schedule.base_batch_size = 640
    quarter = rates_of(batch_size=160)
    np.testing.assert_allclose(quarter, rates / 4, rtol=1e-15)


def test_averages_start_slowly_or_warm_up():
    ema = default.get_config().ema
    plain = optimizer.ema_step_size_schedule(ema)
    assert plain(0) == plain(10**6) == 1 - ema.decay
    ema.warmup = True
    sizes = [float(optimizer.ema_step_size_schedule(ema)(step)) for step in (0, 9, 80, 10**6)]
    assert sizes == pytest.approx([0.9, 9 / 19, 0.1, 1e-4])


def settings(**changes):
    return ml_collections.ConfigDict(
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.0} | changes
    )


def test_three_steps_by_hand():
    rates = np.array([0.5, 0.25])
    optimizer = make_optimizer(settings(), rates, steps_per_rate=2)
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 3.0)}
    state = optimizer.init(params)
    kernel, scale, kernel_v, scale_v = 3.0, 3.0, 0.0, 0.0
    for step in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        rate = rates[step // 2]
        gradient = 1 + 0.1 * kernel
        kernel_v, scale_v = 0.9 * kernel_v + gradient, 0.9 * scale_v + 1
        kernel -= rate * (gradient + 0.9 * kernel_v)
        scale -= rate * (1 + 0.9 * scale_v)
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(params["scale"], scale, rtol=1e-6)


def test_three_steps_of_adamw_by_hand():
    rates = np.array([0.5, 0.25])
    adamw = {"name": "adamw", "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}
    optimizer = make_optimizer(settings(**adamw), rates, steps_per_rate=2)
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 3.0)}
    state = optimizer.init(params)
    kernel, scale, first, second = 3.0, 3.0, 0.0, 0.0
    for step, gradient in enumerate([1.0, -2.0, 3.0]):
        gradients = jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), params)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        move = first / (1 - 0.8 ** (step + 1))
        move /= (second / (1 - 0.9 ** (step + 1))) ** 0.5 + 1e-3
        kernel -= rates[step // 2] * (move + 0.1 * kernel)
        scale -= rates[step // 2] * move
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(params["scale"], scale, rtol=1e-5)


def test_rates_of_parameters_are_multiplied():
    factors = {"stem/kernel": 0.5, "head/kernel": 10.0}
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    gradients = jax.tree.map(lambda a: 3 * a, params)
    updates = []
    for multipliers in (None, factors):
        optimizer = make_optimizer(settings(), np.ones(1), 1, rate_multipliers=multipliers)
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    for layer, factor in (("stem", 0.5), ("head", 10)):
        np.testing.assert_array_equal(
            updates[1][layer]["kernel"], factor * updates[0][layer]["kernel"]
        )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_the_head_did_first_leaves_the_rest_at_its_beginning(name):
    config = default.get_config().optimizer
    config.name = name
    optimizer = make_optimizer(config, np.ones(1), 1, head_first=True)
    alone = make_optimizer(config, np.ones(1), 1)
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    stem, head = ({layer: params[layer]} for layer in ("stem", "head"))
    state, head_state = optimizer.init(params), alone.init(head)
    for _ in range(3):
        updates, state = optimizer.update(head, state, head)
        expected, head_state = alone.update(head, head_state, head)
        np.testing.assert_array_equal(updates["head"]["kernel"], expected["head"]["kernel"])
    updates, _ = optimizer.update(params, state, params)
    expected, _ = alone.update(stem, alone.init(stem), stem)
    np.testing.assert_array_equal(updates["stem"]["kernel"], expected["stem"]["kernel"])
    expected, _ = alone.update(head, head_state, head)
    np.testing.assert_array_equal(updates["head"]["kernel"], expected["head"]["kernel"])


def test_clipping_bounds_the_global_norm():
    optimizer = make_optimizer(
        settings(clip_norm=1.0, weight_decay=0.0, momentum=0.0), np.ones(1), 1
    )
    params = {"kernel": jnp.zeros((3, 3))}
    updates, _ = optimizer.update({"kernel": jnp.full((3, 3), 5.0)}, optimizer.init(params), params)
    assert np.linalg.norm(updates["kernel"]) == pytest.approx(1, rel=1e-5)


def test_weight_decay_is_for_kernels_alone():
    model = cotnet_jax.create_model("cotnext50_2x48d")
    shape = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
    for path, decayed in jax.tree_util.tree_leaves_with_path(optimizer.weight_decay_mask(params)):
        assert decayed == (path[-1].key == "kernel")
