"""The training step on several devices, in processes with fake ones."""

import json

import pytest
from helpers.processes import finish, start_python

pytestmark = pytest.mark.end_to_end

PRELUDE = """
    import dataclasses, json, sys
    import jax, jax.numpy as jnp, numpy as np
    from configs import digits
    from cotnet_jax.training.loop import build_train_step
    from cotnet_jax.training.optimizer import make_optimizer
    from cotnet_jax.training.setup import set_up_training
    from cotnet_jax.training.state import abstract_train_state, create_train_state

    def with_two_stages(setup, **changes):
        '''They have every kind of layer, and compile in half the time.'''
        variant = dataclasses.replace(setup.model.variant, blocks=(1, 1, 0, 0))
        model = setup.model.clone(variant=variant, **changes)
        return dataclasses.replace(setup, eval=dataclasses.replace(setup.eval, model=model))

    def steps(devices, count=5, **changes):
        '''Parameters' values after so many float64 steps on one batch of noise a step.

        In float32 rounding moves activations over a ReLU's kink, on some processors within three
        steps, which changes parameters by 1e-2.
        '''
        jax.config.update("jax_enable_x64", True)
        config = digits.get_config()
        config.batch_size = config.eval.batch_size = 8
        config.mixing.probability = 0.0
        config.schedule.warmup_start = 0.05
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        setup = set_up_training(config, devices=jax.devices()[:devices])
        setup = with_two_stages(setup, dtype=jnp.float64, param_dtype=jnp.float64)
        optimizer = make_optimizer(config.optimizer, setup.learning_rates, setup.steps_per_epoch)
        state = create_train_state(setup, optimizer)
        step = build_train_step(setup, optimizer)
        random = np.random.default_rng(0)
        for _ in range(count):
            batch = {
                "image": random.integers(0, 256, (8, 32, 32, 3), np.uint8),
                "label": random.integers(0, 10, 8, np.int32),
            }
            state, metrics = step(state, batch)
        return jax.device_get((state.params, state.batch_stats))

    def difference(a, b):
        '''Largest ||a - b|| / ||b|| over all arrays.'''
        norm = lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3))
        return max(jax.tree.leaves(jax.tree.map(norm, a, b)))
"""


def run(code, devices):
    (output,) = finish(start_python(PRELUDE + code, devices=devices), timeout=600)
    return json.loads(output.splitlines()[-1])


def test_synchronised_statistics_make_devices_alike():
    """The same global batches give the same parameters on 1, 2 and 4 devices."""
    errors = run(
        """
    one, two, four = (steps(n, **{"model.sync_batch_norm": True}) for n in (1, 2, 4))
    print(json.dumps([difference(two, one), difference(four, one)]))
    """,
        devices=4,
    )
    assert max(errors) < 1e-11


@pytest.mark.slow
def test_statistics_of_each_devices_own_make_another_result():
    (error,) = run(
        """
    print(json.dumps([difference(steps(2), steps(1))]))
    """,
        devices=2,
    )
    assert error > 1e-3


@pytest.mark.slow
def test_accumulated_parts_are_like_devices():
    """Two parts on one device see what two devices see, but for the running statistics."""
    error, statistics = run(
        """
    parts, devices = steps(1, accumulate_steps=2), steps(2)
    print(json.dumps([difference(parts[0], devices[0]), difference(parts[1], devices[1])]))
    """,
        devices=2,
    )
    assert error < 1e-11
    assert statistics > 1e-5


@pytest.fixture(scope="module")
def lowered():
    """What is in the digits' step over four devices: collectives, convolutions by platform."""
    return run(
        """
    import re

    config = digits.get_config()
    setup = with_two_stages(set_up_training(config))
    optimizer = make_optimizer(config.optimizer, setup.learning_rates, setup.steps_per_epoch)
    state = abstract_train_state(setup, optimizer)
    batch = {"image": np.zeros((64, 32, 32, 3), np.uint8), "label": np.zeros(64, np.int32)}
    step = build_train_step(setup, optimizer).trace(state, batch)

    text = step.lower().compile().as_text()
    names = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    collectives = {name: len(re.findall(name + r"(-start)?[(]", text)) for name in names}
    lower = lambda platform: step.lower(lowering_platforms=(platform,)).as_text()
    convolutions = {p: lower(p).count("stablehlo.convolution") for p in ("tpu", "cuda")}
    print(json.dumps({"collectives": collectives, "convolutions": convolutions}))
    """,
        devices=4,
    )


def test_a_step_with_local_statistics_exchanges_only_sums(lowered):
    counts = lowered["collectives"]
    assert counts.pop("all-reduce") > 0
    assert set(counts.values()) == {0}


def test_the_step_lowers_for_accelerators(lowered):
    assert min(lowered["convolutions"].values()) > 50
