"""Weights and runs written by an earlier version load bitwise; goldens/old_formats has them."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import golden

import cotnet_jax
from configs import digits
from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.training.loop import train
from cotnet_jax.training.optimizer import make_optimizer
from cotnet_jax.training.setup import set_up_training
from cotnet_jax.training.state import abstract_train_state

FILES = golden.GOLDENS / "old_formats"
EXPECTED = json.loads((FILES / "expected.json").read_text())
WORKDIR = EXPECTED["workdir"]


def digests(tree):
    """Return {path: dtype, shape and SHA-256} of every array, as old_formats/make.py does."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest = hashlib.sha256(leaf.tobytes()).hexdigest()[:16]
        found[name] = f"{leaf.dtype} {list(leaf.shape)} {digest}"
    return found


@pytest.fixture
def workdir(tmp_path):
    shutil.unpack_archive(FILES / "run.zip", tmp_path)
    return tmp_path / "run"


@pytest.fixture
def config():
    config = digits.get_config()
    # The run continues from its checkpoints, without what it started from.
    given = {name: value for name, value in EXPECTED["flags"].items() if name != "init_from"}
    with config.unlocked():
        config.update_from_flattened_dict(given)
    return config


def test_converted_folder(tmp_path):
    shutil.unpack_archive(FILES / "converted.zip", tmp_path)
    model, variables = cotnet_jax.load(tmp_path / "converted")
    assert model.num_classes == 10
    assert len(EXPECTED["folder"]["ema"]) == 201
    assert digests(variables) == EXPECTED["folder"]["ema"]


def test_best_step_of_a_workdir(workdir):
    _, variables = cotnet_jax.load(workdir)
    assert digests(variables) == WORKDIR["best"]["ema"]


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_one_step_of_a_workdir(workdir, kind):
    step = WORKDIR["older"]["step"]
    _, variables = cotnet_jax.load(workdir / "checkpoints" / str(step), kind=kind)
    assert digests(variables) == WORKDIR["older"][kind]


def test_train_state_of_a_workdir(workdir, config):
    setup = set_up_training(config)
    optimizer = make_optimizer(config.optimizer, setup.learning_rates, setup.steps_per_epoch)
    with open_checkpoints(Workdir(workdir), config) as checkpointer:
        state = checkpointer.restore_latest(abstract_train_state(setup, optimizer))
    assert int(state.step) == WORKDIR["state"]["step"]
    assert digests(state) == WORKDIR["state"]["arrays"]


@pytest.mark.slow
def test_the_run_continues(workdir, config):
    metrics = train(config, workdir)
    assert metrics["count"] == 8
    with open_checkpoints(Workdir(workdir), config, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == WORKDIR["state"]["step"] + 1
