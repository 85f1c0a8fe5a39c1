"""Fine-tuning: what is frozen, in which order, how fast, and until when; on a small network."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_network import Small, create_small, short_digits_config

import cotnet_jax
from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError
from cotnet_jax.distributed.preemption import PreemptedError
from cotnet_jax.training import loop, setup
from cotnet_jax.training import state as train_state
from cotnet_jax.training.evaluate import EvalLoop
from cotnet_jax.training.metric_writer import read_metrics
from cotnet_jax.training.setup import set_up_training
from cotnet_jax.training.trainer import Trainer

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def given():
    """Weights to start from, their statistics other than those of new ones."""
    variables = Small().init(jax.random.key(5), jnp.zeros((1, 8, 8, 3)))
    random = np.random.default_rng(0)
    variables["batch_stats"] = jax.tree.map(
        lambda a: a + random.random(a.shape, np.float32), variables["batch_stats"]
    )
    return jax.device_get(variables)


@pytest.fixture
def config(monkeypatch, given):
    """Twelve steps on the digits, from given weights."""
    monkeypatch.setattr(setup, "create_model", create_small)
    monkeypatch.setattr(train_state, "load", lambda *args, **kwargs: (Small(), given))
    config = short_digits_config()
    config.init_from, config.steps = "given", 12
    config.steps_per_eval = 12
    config.checkpoint.keep_best = 12
    # Drawing from the beta distribution takes most of a small step's compilation.
    config.mixing.probability = 0.0
    return config


def read(config, workdir, step):
    """All items of a checkpoint: {"weights", "ema", "optimizer"}."""
    with open_checkpoints(Workdir(workdir), config, read_only=True) as checkpointer:
        return checkpointer._read_arrays(step)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), a, b)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_layers_stay_bitwise_and_have_no_state(config, given, tmp_path, name):
    config.optimizer.name, config.optimizer.weight_decay = name, 0.1
    config.ema.warmup = True
    config.finetune.freeze = "conv|bn"
    loop.train(config, tmp_path)
    items = read(config, tmp_path, 12)
    for variables in (items["weights"], items["ema"]):
        assert_equal(variables["batch_stats"], given["batch_stats"])
        for layer in ("conv", "bn"):
            assert_equal(variables["params"][layer], given["params"][layer])
        assert differ(variables["params"]["head"], given["params"]["head"])
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(items["optimizer"]["opt_state"])}
    assert shapes == {(), (128, 10), (10,)}


def count(setup, primitive, **options):
    """How often an operation occurs in a train step, backward pass included."""
    optimizer = loop.build_optimizer(setup)
    state = train_state.abstract_train_state(setup, optimizer)
    size = setup.config.data.image_size
    batch = {"image": np.zeros((8, size, size, 3), np.uint8), "label": np.zeros(8, np.int32)}
    step = loop.build_train_step(setup, optimizer, **options)
    return str(step.trace(state, batch).jaxpr).count(primitive)


def test_the_backward_pass_ends_where_the_frozen_layers_begin(config):
    convolution = functools.partial(count, primitive="conv_general_dilated[")
    assert convolution(set_up_training(config)) == 2
    config.finetune.head_only_steps = 5
    run = set_up_training(config)
    assert (convolution(run), convolution(run, head_only=True)) == (2, 1)
    config.finetune.head_only_steps, config.finetune.freeze = 0, "conv"
    assert convolution(set_up_training(config)) == 1


@pytest.mark.slow
def test_the_backward_pass_of_a_cotnet_ends_there_too(config, monkeypatch):
    monkeypatch.undo()
    config.model.name, config.data.image_size = "cotnet_tiny", 32
    convolutions = {}
    for freeze in ("", "stem|stage[12].*", "stem|stage.*"):
        config.finetune.freeze = freeze
        run = set_up_training(config)
        convolutions[freeze] = count(run, "conv_general_dilated[")
    images = jnp.zeros((8, 32, 32, 3))
    forward = jax.jit(run.model.apply).trace(run.variable_shapes, images)
    assert convolutions["stem|stage.*"] == str(forward.jaxpr).count("conv_general_dilated[")
    assert convolutions["stem|stage.*"] < convolutions["stem|stage[12].*"] < convolutions[""]


@pytest.fixture
def stop_after(monkeypatch):
    """Have runs stopped by a signal after a step; 0 lets them go on."""

    def set_step(step):
        monkeypatch.setattr(Trainer, "should_stop", lambda self: self.step == step)

    return set_step


def test_a_run_with_everything_resumes_bitwise_in_every_phase(config, given, tmp_path, stop_after):
    config.finetune.head_only_steps = 5
    config.finetune.rate_multipliers = "head=3"
    config.finetune.layer_decay = 0.5
    config.optimizer.name, config.ema.warmup = "adamw", True
    config.optimizer.clip_norm = 1.0
    config.schedule.unit, config.schedule.warmup_steps = "step", 3
    config.data.balanced_sampling = True
    config.steps_per_eval = 5
    loop.train(config, tmp_path / "whole")
    for step in (3, 8):
        stop_after(step)
        with pytest.raises(PreemptedError, match=f"step {step} of 12 is saved"):
            loop.train(config, tmp_path / "parts")
    stop_after(0)
    loop.train(config, tmp_path / "parts")
    assert_equal(*(read(config, tmp_path / name, 12) for name in ("whole", "parts")))

    first, last = (read(config, tmp_path / "whole", step)["weights"] for step in (5, 12))
    assert_equal(first["batch_stats"], given["batch_stats"])
    assert_equal(first["params"]["conv"], given["params"]["conv"])
    assert differ(first["params"]["head"], given["params"]["head"])
    assert differ(last, given)

    config.finetune.head_only_steps = 6
    with pytest.raises(WorkdirError, match=r"finetune.head_only_steps: 5 there, 6 here"):
        loop.train(config, tmp_path / "whole")


def test_the_rest_begins_with_an_optimizer_of_its_own(config, tmp_path):
    """AdamW's first update is the sign of the gradient, if its moments are counted from there."""
    config.optimizer.name, config.optimizer.weight_decay = "adamw", 0.0
    config.schedule.warmup_epochs, config.finetune.head_only_steps = 0, 9
    config.steps, config.steps_per_eval = 10, 9
    loop.train(config, tmp_path)
    before, after = (read(config, tmp_path, step)["weights"]["params"] for step in (9, 10))
    moved = np.abs(after["conv"]["kernel"] - before["conv"]["kernel"])
    rate = set_up_training(config).learning_rate(9)
    assert np.median(moved) == pytest.approx(rate, rel=1e-2)


def test_patterns_and_layers_have_rates_of_their_own(config, given):
    config.finetune.rate_multipliers, config.finetune.layer_decay = "head/bias=3", 0.5
    config.optimizer.weight_decay = 0.0
    optimizer = loop.build_optimizer(set_up_training(config))
    ones = jax.tree.map(jnp.ones_like, given["params"])
    updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
    relative = jax.tree.map(lambda a: float(a.ravel()[0]), updates)
    base = relative["head"]["kernel"]
    assert relative["head"]["bias"] == pytest.approx(3 * base)
    assert relative["conv"]["kernel"] == pytest.approx(base / 2)


def metrics_of_evaluations(monkeypatch, values):
    """Let evaluations measure these values, one after the other."""
    values = iter(values)

    def run(self, weights, after_batch=None):
        value = next(values)
        return {"raw_top1": value, "ema_top1": value, "raw_loss": -value, "count": 12}

    monkeypatch.setattr(EvalLoop, "run", run)


# The best value comes third; three more do not reach it.
VALUES = [10.0, 20.0, 30.0, 29.0, 30.0, 25.0]


@pytest.mark.parametrize(("metric", "stops"), [("ema_top1", ()), ("raw_loss", (3, 10))])
def test_early_stopping(config, tmp_path, monkeypatch, caplog, stop_after, metric, stops):
    caplog.set_level("INFO")
    config.steps, config.steps_per_eval, config.checkpoint.keep_best = 40, 2, 1
    config.early_stopping.metric, config.early_stopping.patience = metric, 3
    metrics_of_evaluations(monkeypatch, VALUES)
    for step in stops:
        stop_after(step)
        with pytest.raises(PreemptedError):
            loop.train(config, tmp_path)
    stop_after(0)
    assert loop.train(config, tmp_path)["ema_top1"] == 25
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 12
    best = 30 if metric == "ema_top1" else -30
    reason = f"{metric} has not become better in 3 evaluations, since it was {best} after step 6"
    assert f"Stopped early after step 12: {reason}." in caplog.text

    metrics_of_evaluations(monkeypatch, itertools.repeat(1.0))
    assert loop.train(config, tmp_path)["ema_top1"] == 1
    assert f"This run is finished: {reason}." in caplog.text
    # With more patience it goes on from there.
    config.early_stopping.patience = 5
    loop.train(config, tmp_path)
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 16


def test_an_evaluation_that_was_missed_counts_once(config, tmp_path, monkeypatch):
    config.steps, config.steps_per_eval = 8, 2
    config.early_stopping.metric, config.early_stopping.patience = "raw_top1", 2
    metrics_of_evaluations(monkeypatch, [3.0, 2.0])
    with pytest.raises(StopIteration):
        loop.train(config, tmp_path)
    # Its line was written, but not its checkpoint's metrics.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "raw_top1": 4.0}) + "\n")
    metrics_of_evaluations(monkeypatch, [4.0, 3.5])
    loop.train(config, tmp_path)
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_class_weights_multiply_the_targets(config, monkeypatch):
    config.loss.class_weights = "balanced"
    config.mixing.label_smoothing = 0.0
    run = set_up_training(config)
    labels = [run.train_source[record]["label"] for record in range(32)]
    counts = np.bincount(labels, minlength=10)
    weights = np.where(counts, 32 / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0)
    np.testing.assert_allclose(run.class_weights, weights, rtol=1e-6)
    monkeypatch.setattr(loop, "make_train_step", lambda model, optimizer, mix, **_: mix)
    mix = loop.build_train_step(run, None)
    batch = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.array([1, 2, 3, 4])}
    _, targets = mix(jax.random.key(0), batch)
    np.testing.assert_allclose(targets, np.eye(10)[1:5] * weights, rtol=1e-6)


def test_a_warm_up_or_a_first_phase_longer_than_the_run_is_refused(config, tmp_path):
    """Where one is in epochs and the other in steps, once the length of an epoch is known."""
    config.steps, config.epochs = 0, 3
    config.schedule.unit, config.schedule.warmup_steps = "step", 13
    config.finetune.head_only_steps = 12
    with pytest.raises(ValueError) as error:
        loop.train(config, tmp_path)
    run = "the run's --config.epochs=3 (an epoch is 4 steps), or"
    assert str(error.value).splitlines()[1:] == [
        f"  --config.schedule.warmup_steps=13: must be at most {run} the learning rate never "
        "reaches its peak",
        f"  --config.finetune.head_only_steps=12: must be less than {run} the rest is never "
        "trained (--config.finetune.freeze)",
    ]
    config.schedule.warmup_steps, config.finetune.head_only_steps = 12, 11
    set_up_training(config)


def test_the_configuration_for_fine_tuning_is_sound(monkeypatch, tmp_path):
    from cotnet_jax.configs import finetune

    config = finetune.get_config()
    config.data.name, config.data.eval_split = "digits", "test"
    with pytest.raises(ValueError, match=r"--config.finetune.new_head=True: .*--weights=PATH"):
        set_up_training(config)
    config.init_from = "weights/cotnet50"
    run = set_up_training(config)
    rates = [run.learning_rate(step) for step in range(run.total_steps)]
    assert max(rates) == pytest.approx(config.schedule.peak, rel=0.1)
    assert rates[0] == 0 and rates[-1] < 1e-6
    assert len(set(rates)) > run.total_steps // 2
    assert isinstance(run.model, cotnet_jax.models.CoTNet)
