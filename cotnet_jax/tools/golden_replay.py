"""Repeat the computations of golden files, and compare the results with the reference values."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import cotnet_jax
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.distributed import sharding
from cotnet_jax.tools import goldens
from cotnet_jax.training.mixup import blend, smooth_one_hot
from cotnet_jax.training.optimizer import make_optimizer
from cotnet_jax.training.step import make_train_step
from cotnet_jax.weights.name_map import to_torch_state_dict

# Of logits, and of pooled features, which are stored in float32.
FORWARD_TOLERANCE = {"float64": (1e-9, 1e-7), "float32": (5e-6, 5e-6)}
TRAIN_TOLERANCE = 1e-6
# Gradients in front of a BatchNorm are zero but for rounding.
ZERO_GRADIENT = 1e-9
_STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")

Comparisons = Iterator[tuple[str, float, float]]


def replay(
    path: Path, dtype: str = "float64", compiler_options: Mapping[str, object] | None = None
) -> Comparisons:
    """Yield (name, relative error, tolerance) for each reference value of a golden file.

    Args:
      path: FOLDER/forward/MODEL_HxW.npz or FOLDER/train/MODEL.npz; the shapes of the model's
        tensors are read from FOLDER/state_dict.
      dtype: "float64" or "float32", of the forward pass. Training is in float64.
      compiler_options: of XLA; None leaves the choice to XLA.

    Raises:
      ValueError: the file holds neither a forward pass nor training steps.
    """
    with np.load(path) as file:
        reference = dict(file)
    if not {"logits", "losses"} & reference.keys():
        raise ValueError(f"{path} holds neither 'logits' (forward) nor 'losses' (train)")
    model = goldens.model_of(path)
    shapes = goldens.state_dict_shapes(model, path.parents[1] / "state_dict")
    weights = goldens.state_dict(shapes, int(reference["seed"]))
    if "logits" in reference:
        with jax.enable_x64(dtype == "float64"):
            yield from _forward(model, weights, reference, dtype, compiler_options)
    else:
        with jax.enable_x64(True):
            yield from _train(model, weights, reference, compiler_options)


def _variables(name, weights, dtype):
    variables = cotnet_jax.from_torch_state_dict(name, weights)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)


def _forward(name, weights, reference, dtype, compiler_options) -> Comparisons:
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    logits_tolerance, pool_tolerance = FORWARD_TOLERANCE[dtype]
    model = cotnet_jax.create_model(name, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    images = goldens.images(int(reference["seed"]) + 1, reference["input_shape"])
    images = jnp.asarray(images, dtype)
    variables = _variables(name, weights, dtype)
    backbone = model.clone(features_only=True, out_indices=tuple(range(len(_STAGES))))

    @jit
    def classify_and_extract(variables, images):
        """Of what both models compute XLA keeps one."""
        return model.apply(variables, images), backbone.apply(variables, images)

    logits, features = classify_and_extract(variables, images)
    yield "logits", goldens.relative_error(logits, reference["logits"]), logits_tolerance
    for stage, array in zip(_STAGES, features, strict=True):
        error = goldens.relative_error(array.mean((1, 2)), reference[f"pool_{stage}"])
        yield f"features_only_{stage}", error, pool_tolerance
    # With intermediates the CoT layers run unfused: another path through the network.
    apply = functools.partial(model.apply, mutable=["intermediates"])
    logits, state = jit(apply)(variables, images)
    error = goldens.relative_error(logits, reference["logits"])
    yield "logits_with_intermediates", error, logits_tolerance
    for stage in _STAGES:
        features = state["intermediates"][f"{stage.replace('layer', 'stage')}_features"][0]
        error = goldens.relative_error(features.mean((1, 2)), reference[f"pool_{stage}"])
        yield f"pool_{stage}", error, pool_tolerance


def _train(name, weights, reference, compiler_options) -> Comparisons:
    """Run four steps of the train step itself, in float64, on one device."""
    seed, shape = int(reference["seed"]), reference["input_shape"]
    model = cotnet_jax.create_model(name, dtype=jnp.float64, param_dtype=jnp.float64)
    settings = ml_collections.ConfigDict(
        {"name": "sgd", "momentum": 0.9, "weight_decay": 4e-5, "clip_norm": 0.0}
    )
    optimizer = make_optimizer(settings, reference["lr"], steps_per_rate=1)
    mesh = sharding.make_mesh(jax.devices()[:1])
    # The stored images are normalised already: mean 0 and std 1 / 255 leave them as they are.
    step = make_train_step(
        model,
        optimizer,
        _mix,
        mesh=mesh,
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
        ema_step_size=optax.constant_schedule(1 - 0.9),
        accumulate_steps=1,
    )
    variables = _variables(name, weights, jnp.float64)
    batches = [_batch(seed, shape, number) for number in range(len(reference["lr"]))]
    mixed, _ = _mix(None, batches[0])
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply, compiler_options=compiler_options)(variables, mixed)
    yield "logits0", goldens.relative_error(logits, reference["logits0"]), TRAIN_TOLERANCE

    params = variables["params"]
    state = sharding.replicate(
        mesh,
        TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables["batch_stats"],
            ema=jax.tree.map(jnp.copy, variables),
            opt_state=optimizer.init(params),
            key=jax.random.key_data(jax.random.key(0)),
        ),
    )
    losses = []
    step = step.lower(state, batches[0]).compile(compiler_options=compiler_options)
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        if number == 0:
            gradients = _first_gradients(state, params, settings.weight_decay)
            yield from _gradients(name, reference, gradients)
    for number, loss in enumerate(losses):
        error = goldens.relative_error(loss, reference["losses"][number])
        yield f"losses[{number}]", error, TRAIN_TOLERANCE
    final = {"params": state.params, "batch_stats": state.batch_stats}
    for kind, variables in (("final", final), ("ema", state.ema)):
        yield from _norms(kind, to_torch_state_dict(name, variables), reference)


def _first_gradients(state, params, decay):
    """The gradients of the first step, whose momentum is gradient + weight decay * weights."""

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
        "image": goldens.images(seed + 100 + number, shape).astype(np.float64),
        "label": labels.astype(np.int32),
        "share": np.full(shape[:1], share),
    }


def _gradients(model, reference, gradients) -> Comparisons:
    empty = {"params": gradients, "batch_stats": {}}
    gradients = to_torch_state_dict(model, empty)
    floor = ZERO_GRADIENT * max(np.linalg.norm(g) for g in gradients.values())
    expected = {k: v for k, v in reference.items() if k.startswith("gradnorm/") and v >= floor}
    yield from _norms("gradnorm", gradients, expected)
    for name, whole in reference.items():
        if name.startswith("grad/"):
            error = goldens.relative_error(gradients[name.removeprefix("grad/")], whole)
            yield name, error, TRAIN_TOLERANCE


def _norms(kind, tensors, reference) -> Comparisons:
    for name, expected in reference.items():
        folder, _, tensor = name.partition("/")
        if folder == kind and not tensor.endswith("num_batches_tracked"):
            norm = np.linalg.norm(tensors[tensor])
            yield name, goldens.relative_error(norm, expected), TRAIN_TOLERANCE
