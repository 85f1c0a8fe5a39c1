"""Replays golden files: yields (figure, relative error, tolerance) for each figure in them.

Used by the tests and by ``python tests/check_golden.py FILE ...``.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import cotnet_jax
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.distributed import sharding
from cotnet_jax.training.mixup import blend, smooth_one_hot
from cotnet_jax.training.optimizer import make_optimizer
from cotnet_jax.training.step import make_train_step
from cotnet_jax.weights.name_map import to_torch_state_dict
from helpers import golden, quick

# Pooled features are stored in float32.
FORWARD_TOLERANCE = {"float64": (1e-9, 1e-7), "float32": (5e-6, 5e-6)}
TRAIN_TOLERANCE = 1e-6
# Gradients in front of a BatchNorm are zero but for rounding.
ZERO_GRADIENT = 1e-9


def replay(path: Path, dtype: str = "float64") -> Iterator[tuple[str, float, float]]:
    """The figures of a file of the forward or the train kind."""
    with np.load(path) as file:
        figures = dict(file)
    if "logits" in figures:
        yield from forward(golden.model_of(path), figures, dtype)
    elif "losses" in figures:
        yield from train(golden.model_of(path), figures)
    else:
        raise ValueError(f"{path} holds neither 'logits' (forward) nor 'losses' (train)")


def _variables(model, seed, dtype):
    weights = golden.state_dict(golden.state_dict_shapes(model), seed)
    variables = cotnet_jax.from_torch_state_dict(model, weights)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)


def forward(model: str, figures, dtype: str):
    logits_tolerance, pool_tolerance = FORWARD_TOLERANCE[dtype]
    seed = int(figures["seed"])
    with jax.enable_x64(dtype == "float64"):
        net = cotnet_jax.create_model(model, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        images = jnp.asarray(golden.images(seed + 1, figures["input_shape"]), dtype)
        variables = _variables(model, seed, dtype)
        # In float32 as a user compiles it.
        options = quick.OPTIONS if dtype == "float64" else quick.USERS_OPTIONS
        jit = functools.partial(jax.jit, compiler_options=options)
        logits = jit(net.apply)(variables, images)
        yield "logits", golden.relative_error(logits, figures["logits"]), logits_tolerance
        # A look inside takes the layers apart: another path through the network.
        look = jit(functools.partial(net.apply, mutable=["intermediates"]))
        logits, state = look(variables, images)
        yield "logits_of_look", golden.relative_error(logits, figures["logits"]), logits_tolerance
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            features = state["intermediates"][f"{name.replace('layer', 'stage')}_features"][0]
            error = golden.relative_error(features.mean((1, 2)), figures[f"pool_{name}"])
            yield f"pool_{name}", error, pool_tolerance


def train(model: str, figures):
    """Four steps of the training step itself, in float64, on one device."""
    with jax.enable_x64(True):
        yield from _train(model, figures)


def _train(model, figures):
    seed, shape = int(figures["seed"]), figures["input_shape"]
    net = cotnet_jax.create_model(model, dtype=jnp.float64, param_dtype=jnp.float64)
    settings = ml_collections.ConfigDict({"momentum": 0.9, "weight_decay": 4e-5, "clip_norm": 0.0})
    optimizer = make_optimizer(settings, figures["lr"], steps_per_epoch=1)
    mesh = sharding.make_mesh(jax.devices()[:1])
    # The stored images are normalised already: mean 0 and std 1 / 255 leave them as they are.
    step = make_train_step(
        net,
        optimizer,
        _mix,
        mesh=mesh,
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
        ema_step_size=optax.constant_schedule(1 - 0.9),
        accumulate_steps=1,
    )
    weights = _variables(model, seed, jnp.float64)
    batches = [_batch(seed, shape, s) for s in range(len(figures["lr"]))]
    mixed, _ = _mix(None, batches[0])
    apply = functools.partial(net.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply, compiler_options=quick.OPTIONS)(weights, mixed)
    yield "logits0", golden.relative_error(logits, figures["logits0"]), TRAIN_TOLERANCE

    params = weights["params"]
    state = sharding.replicate(
        mesh,
        TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=weights["batch_stats"],
            ema=jax.tree.map(jnp.copy, weights),
            opt_state=optimizer.init(params),
            key=jax.random.key_data(jax.random.key(0)),
        ),
    )
    losses = []
    # Without any optimisation convolutions in float64 take longer than is saved.
    options = quick.USERS_OPTIONS | {"xla_backend_optimization_level": 1}
    step = step.lower(state, batches[0]).compile(compiler_options=options)
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        if number == 0:
            gradients = _first_gradients(state, params, settings.weight_decay)
            yield from _gradients(model, figures, gradients)
    for number, loss in enumerate(losses):
        error = golden.relative_error(loss, figures["losses"][number])
        yield f"losses[{number}]", error, TRAIN_TOLERANCE
    final = {"params": state.params, "batch_stats": state.batch_stats}
    for kind, variables in (("final", final), ("ema", state.ema)):
        yield from _norms(kind, to_torch_state_dict(model, variables), figures)


def _first_gradients(state, params, decay):
    """The first momentum is the gradient and the decayed weights."""

    def gradient(velocity, param):
        velocity, param = np.asarray(velocity), np.asarray(param)
        return velocity - decay * param if param.ndim > 1 else velocity

    return jax.tree.map(gradient, state.opt_state[2].trace, params)


def _mix(key, batch):
    del key
    images = blend(batch["image"], batch["share"][0])
    targets = smooth_one_hot(batch["label"], 1000, 0.1, jnp.float64)
    return images, blend(targets, batch["share"][0])


def _batch(seed, shape, number):
    random = np.random.RandomState(seed + 200 + number)
    labels = random.randint(0, 1000, shape[:1])
    share = round(random.uniform(), 3)
    return {
        "image": golden.images(seed + 100 + number, shape).astype(np.float64),
        "label": labels.astype(np.int32),
        "share": np.full(shape[:1], share),
    }


def _gradients(model, figures, gradients):
    empty = {"params": gradients, "batch_stats": {}}
    gradients = to_torch_state_dict(model, empty)
    floor = ZERO_GRADIENT * max(np.linalg.norm(g) for g in gradients.values())
    expected = {k: v for k, v in figures.items() if k.startswith("gradnorm/") and v >= floor}
    yield from _norms("gradnorm", gradients, expected)
    for name, whole in figures.items():
        if name.startswith("grad/"):
            error = golden.relative_error(gradients[name.removeprefix("grad/")], whole)
            yield name, error, TRAIN_TOLERANCE


def _norms(kind, tensors, figures):
    for name, expected in figures.items():
        folder, _, tensor = name.partition("/")
        if folder == kind and not tensor.endswith("num_batches_tracked"):
            norm = np.linalg.norm(tensors[tensor])
            yield name, golden.relative_error(norm, expected), TRAIN_TOLERANCE
