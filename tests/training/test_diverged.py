"""Runs whose weights, losses or predictions stop being finite, and what they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_network import Small, create_small, short_digits_config

from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.weight_values import find_not_finite
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.training import evaluate, loop, setup
from cotnet_jax.training.optimizer import make_optimizer
from cotnet_jax.training.state import abstract_train_state
from cotnet_jax.training.step import _are_finite
from cotnet_jax.training.trainer import DivergedError
from cotnet_jax.weights import read_weights
from cotnet_jax.weights.folder import WeightsError

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def config(monkeypatch):
    """A run of three epochs of four steps on the digits, with the small network."""

    monkeypatch.setattr(setup, "create_model", create_small)
    config = short_digits_config()
    config.checkpoint.keep_best = 0
    config.schedule.warmup_epochs = 1
    return config


def steps_in(workdir) -> set[str]:
    return {path.name for path in Workdir(workdir).checkpoints.iterdir()}


def assert_finite(workdir, step):
    """A checkpoint that loads, and whose every array is finite."""
    for kind in ("raw", "ema"):
        read = read_weights(Workdir(workdir).checkpoints / str(step), kind)
        assert not find_not_finite(read.variables)


def test_an_absurd_learning_rate_leaves_finite_checkpoints(config, tmp_path):
    """The second epoch has the rate; the step after its first overflows."""
    config.schedule.peak, config.checkpoint.every_steps = 1e30, 1
    with pytest.raises(DivergedError, match="Checkpoint 4 is good") as error:
        loop.train(config, tmp_path)
    assert "step 6 " in str(error.value)
    assert "checkpoint 5, which the run failed from, is now 5.diverged" in str(error.value)
    assert steps_in(tmp_path) == {"4", "5.diverged"}
    assert_finite(tmp_path, 4)

    config.schedule.peak, config.checkpoint.every_steps = 0.1, 0
    config.resume.allow_changes = "schedule"
    assert np.isfinite(loop.train(config, tmp_path)["ema_loss"])
    assert steps_in(tmp_path) == {"8", "12", "5.diverged"}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_weights_that_overflow_in_one_step_are_not_saved(config, tmp_path):
    """The loss of the step is finite, and only the log's interval would show the next one."""
    config.schedule.peak, config.checkpoint.every_steps = 1e39, 1
    with pytest.raises(
        DivergedError, match=r"step 5 made weights that are not finite.*Checkpoint 3 is good"
    ):
        loop.train(config, tmp_path)
    assert steps_in(tmp_path) == {"3", "4.diverged"}
    assert_finite(tmp_path, 3)


def test_a_loss_that_is_not_finite_beside_weights_that_are(config, tmp_path, monkeypatch):
    """As of an optimizer that bounds or skips updates."""
    build = loop.build_train_step

    def build_spoilt(*arguments, **options):
        step = build(*arguments, **options)

        def spoilt(state, batch):
            state, metrics = step(state, batch)
            loss = jnp.where(state.step == 6, jnp.inf, metrics["loss"])
            return state, metrics | {"loss": loss}

        return jax.jit(spoilt, donate_argnums=0)

    monkeypatch.setattr(loop, "build_train_step", build_spoilt)
    config.checkpoint.every_steps = 1
    with pytest.raises(DivergedError, match=r"the loss of step 6 is inf .*Checkpoint 4 is good"):
        loop.train(config, tmp_path)
    assert steps_in(tmp_path) == {"4", "5.diverged"}


def test_the_only_checkpoint_stays(config, tmp_path):
    config.schedule.warmup_epochs, config.schedule.peak = 0, 1e30
    config.checkpoint.every_steps = 1
    with pytest.raises(
        DivergedError, match=r"step 2 .*The only checkpoint in .* is 1: it is finite"
    ):
        loop.train(config, tmp_path)
    assert steps_in(tmp_path) == {"1"}
    assert_finite(tmp_path, 1)


def save_with(config, workdir, change):
    """Replaces the newest checkpoint's state by one that an earlier version might have saved."""
    with open_checkpoints(Workdir(workdir), config) as checkpointer:
        newest = checkpointer.latest_step()
        run = setup.set_up_training(config)
        optimizer = make_optimizer(config.optimizer, run.learning_rates, run.steps_per_epoch)
        state = checkpointer.restore_latest(abstract_train_state(run, optimizer))
        checkpointer.save(change(state).replace(step=jnp.int32(newest + 1)))


def test_an_earlier_versions_checkpoint_that_is_not_finite(config, tmp_path, caplog):
    config.epochs = 1
    loop.train(config, tmp_path)
    save_with(
        config,
        tmp_path,
        lambda state: state.replace(params=jax.tree.map(lambda a: a * np.inf, state.params)),
    )
    config.epochs, config.resume.allow_changes = 2, "epochs"
    caplog.set_level("INFO")
    loop.train(config, tmp_path)
    assert "step 5: " in caplog.text
    assert "Resuming after step 4 of 8." in caplog.text
    assert {"4", "8", "5.damaged"} == steps_in(tmp_path)


def test_evaluation_of_weights_that_are_no_numbers(config, tmp_path):
    config.epochs = 1
    loop.train(config, tmp_path)
    save_with(
        config,
        tmp_path,
        lambda state: state.replace(
            ema={**state.ema, "batch_stats": jax.tree.map(lambda a: -1 - a**2, state.batch_stats)}
        ),
    )
    config.init_from = str(tmp_path / "checkpoints" / "5")
    with pytest.raises(ValueError, match="batch_stats/bn/var: 128 of 128 values are negative"):
        evaluate.evaluate_only(config, None)
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "4")
    config.init_from = ""
    with pytest.raises(WeightsError, match=r"the ema weights: 1 array .*\n.*bn/var"):
        evaluate.evaluate_only(config, tmp_path)


def test_predictions_of_an_evaluation_that_are_not_finite(config, tmp_path):
    config.epochs = 1
    loop.train(config, tmp_path)
    save_with(
        config,
        tmp_path,
        lambda state: state.replace(
            ema={**state.ema, "params": jax.tree.map(lambda a: a + 3e38, state.params)}
        ),
    )
    config.init_from = str(tmp_path / "checkpoints" / "5")
    with pytest.raises(evaluate.PredictionsError, match="not finite: given_loss is nan"):
        evaluate.evaluate_only(config, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_one_scalar_finds_a_value_in_any_array(value):
    variables = Small().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    are_finite = jax.jit(_are_finite)
    assert are_finite(variables)
    # No false alarm, where a sum of squares would overflow.
    assert are_finite(jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e38), variables))
    leaves, structure = jax.tree.flatten(variables)
    for index, leaf in enumerate(leaves):
        poisoned = leaf.ravel().at[-1].set(value).reshape(leaf.shape)
        changed = [*leaves[:index], poisoned, *leaves[index + 1 :]]
        assert not are_finite(jax.tree.unflatten(structure, changed))
