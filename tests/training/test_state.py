"""The train state before the first step."""

import dataclasses

import jax

from configs import digits
from cotnet_jax.training.loop import build_optimizer
from cotnet_jax.training.setup import set_up_training
from cotnet_jax.training.state import abstract_batch, abstract_train_state, create_train_state


def set_up_two_stages():
    """They have every kind of layer."""
    config = digits.get_config()
    config.batch_size = config.eval.batch_size = 8
    setup = set_up_training(config)
    variant = dataclasses.replace(setup.model.variant, blocks=(1, 1, 0, 0))
    model = setup.model.clone(variant=variant)
    return dataclasses.replace(setup, eval=dataclasses.replace(setup.eval, model=model))


def test_shapes_are_known_before_the_state_and_a_batch():
    setup = set_up_two_stages()
    optimizer = build_optimizer(setup)
    state = create_train_state(setup, optimizer)
    batches = setup.train_batches(0)
    batch = next(batches)
    batches.close()

    def describe(a):
        return a.shape, a.dtype, getattr(a, "sharding", None)

    described = jax.tree.map(describe, abstract_train_state(setup, optimizer))
    assert described == jax.tree.map(describe, state)
    described = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_batch(setup))
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), batch)
