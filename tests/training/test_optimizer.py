"""The recipe's learning rates and its SGD."""

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
        ours = optimizer.learning_rates(schedule, 350, batch_size=640)
        np.testing.assert_allclose(ours, rates, rtol=1e-13)


def test_learning_rates_scale_with_the_batch_on_request():
    schedule = default.get_config().schedule
    rates = optimizer.learning_rates(schedule, 20, batch_size=640)
    np.testing.assert_array_equal(optimizer.learning_rates(schedule, 20, batch_size=160), rates)
    schedule.base_batch_size = 640
    quarter = optimizer.learning_rates(schedule, 20, batch_size=160)
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
        {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.0} | changes
    )


def test_three_steps_by_hand():
    rates = np.array([0.5, 0.25])
    optimizer = make_optimizer(settings(), rates, steps_per_epoch=2)
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
