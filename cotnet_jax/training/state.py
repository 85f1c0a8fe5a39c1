"""The train state before the first step, and the shapes of states and batches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.config import weight_kinds
from cotnet_jax.distributed import sharding
from cotnet_jax.models import parameter_names
from cotnet_jax.training.setup import TrainSetup
from cotnet_jax.weights.loading import load


def create_train_state(setup: TrainSetup, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, replicated over the devices.

    Its weights are those of config.init_from, or random. They are made on the CPU, whatever the
    devices: there so many small programs compile fastest, and the same seed gives the same weights.
    """
    config = setup.config
    from_variables = functools.partial(_initial_state, setup, optimizer)
    with jax.default_device(sharding.host_device()):
        if config.init_from:
            _, variables = load(
                config.init_from,
                num_classes=setup.model.num_classes,
                kind=config.init_kind or None,
                model=config.model.name,
                class_names=setup.class_names,
                accept_classes=config.accept_classes,
                new_head=config.finetune.new_head,
                seed=config.seed,
            )
            state = _jit_once(from_variables)(variables)
        else:
            init = setup.model.init
            state = _jit_once(lambda *args: from_variables(init(*args)))(*setup.init_arguments)
    return sharding.replicate(setup.mesh, state)


def abstract_train_state(setup: TrainSetup, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state's shapes, dtypes and shardings as ``jax.ShapeDtypeStruct``s.

    Nothing is computed or read.
    """
    from_variables = functools.partial(_initial_state, setup, optimizer)
    state = jax.eval_shape(from_variables, setup.variable_shapes)
    return sharding.replicate_abstract(setup.mesh, state)


def abstract_batch(setup: TrainSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings of a batch on the devices, of all processes."""
    batch_size, size = setup.config.batch_size, setup.config.data.image_size
    sharded = NamedSharding(setup.mesh, sharding.SHARDED)
    return {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=sharded),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharded),
    }


def weights_of(state: TrainState) -> dict[str, dict]:
    """Return {"raw": variables} and, where there is an EMA, {"ema": variables}."""
    weights = {"raw": {"params": state.params, "batch_stats": state.batch_stats}}
    if state.ema is not None:
        weights["ema"] = state.ema
    return weights


def _initial_state(
    setup: TrainSetup,
    optimizer: optax.GradientTransformation,
    variables: Mapping[str, Any],
) -> TrainState:
    _, run_key = jax.random.split(jax.random.key(setup.config.seed))
    trained, _ = parameter_names.split(variables["params"], setup.groups.frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema=jax.tree.map(jnp.copy, variables) if "ema" in weight_kinds(setup.config) else None,
        opt_state=optimizer.init(trained),
        key=jax.random.key_data(run_key),
    )


def _jit_once(function):
    """Compile what runs only once, without optimising it, which takes longer than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
