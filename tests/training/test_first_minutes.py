"""What a start of training shows: a summary, that it compiles, and no lines of others."""

import logging
import time

import absl.logging
import jax
import jax.numpy as jnp
from helpers.small_network import Small, create_small, short_digits_config

from cotnet_jax import command_line
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.command_line.log_lines import _OwnLines
from cotnet_jax.models.stages import split_by_stage
from cotnet_jax.training import compiling, setup
from cotnet_jax.training.summary import start_summary


def test_parameters_are_split_by_stage():
    tree = {"stage2_block0": 1, "head": 2, "stage1_block1": 3, "stem": 4, "stage1_block0": 5}
    assert list(split_by_stage(tree).items()) == [
        ("stem", {"stem": 4}),
        ("stage1", {"stage1_block0": 5, "stage1_block1": 3}),
        ("stage2", {"stage2_block0": 1}),
        ("head", {"head": 2}),
    ]


def test_the_summary_fits_a_screen_and_names_what_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "create_model", create_small)
    training = setup.set_up_training(short_digits_config())
    variables = jax.eval_shape(Small().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    text = start_summary(training, variables["params"], Workdir(tmp_path))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] != " ")
    assert len(text.splitlines()) <= 24
    assert lines["Model:"] == "cotnet_tiny, 5,130 parameters, activations in float32"
    assert "bn 256, conv 3,584, head 1,290" in text
    assert lines["Classes:"] == "10"
    assert lines["Images:"] == "32 to train (train[:32]), 12 to evaluate (test[:12]), 8 x 8"
    assert lines["Input:"] == "2 threads to train, 2 threads to evaluate, about 0.0 GB of memory"
    assert lines["Steps:"] == "12 of 8 images, 4 an epoch; evaluated every 4"
    assert lines["Schedule:"] == (
        "learning rate 0.0001, 0.075 from epoch 2 of 3, 0.02501 in the last"
    )
    assert lines["Config:"] == str(tmp_path / "config.json")
    assert lines["Files:"].startswith(f"{tmp_path}: parameters.txt, metrics.jsonl, checkpoints/")
    assert lines["Curves:"] == f"tensorboard --logdir={tmp_path}/tensorboard"


def test_compiling_says_so_with_seconds(monkeypatch):
    lines = []
    monkeypatch.setattr(absl.logging, "info", lambda text, *args: lines.append(text % args))
    with compiling.say_while_compiling("the train step", seconds_between_lines=0.01):
        deadline = time.monotonic() + 60
        while len(lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines[:2] == ["Compiling the train step.", "Still compiling the train step: 0 s."]
    count = len(lines)
    time.sleep(0.03)
    assert len(lines) == count, "no lines after the end"


def record(path, level, text, name="jax._src.xla_bridge", error=None):
    information = (type(error), error, None) if error else None
    return logging.LogRecord(name, level, path, 1, text, (), information)


def test_lines_of_other_packages_are_hidden_but_for_warnings():
    own = command_line.log_lines.__file__
    other = "/site-packages/jax/_src/xla_bridge.py"
    lines = _OwnLines()
    assert lines.filter(record(own, logging.INFO, "a step"))
    assert not lines.filter(record(other, logging.INFO, "Unable to initialize backend 'tpu'"))
    assert lines.filter(record(other, logging.WARNING, "Falling back to cpu."))
    failed = record(
        other, logging.ERROR, "Jax plugin configuration error", error=RuntimeError("no GPU\nmore")
    )
    assert lines.filter(failed)
    assert logging.Formatter("%(message)s").format(failed) == (
        "Jax plugin configuration error: no GPU"
    )


def test_the_filter_is_added_once():
    handler = absl.logging.get_absl_handler()
    before = list(handler.filters)
    try:
        command_line.show_own_lines()
        command_line.show_own_lines()
        assert sum(isinstance(each, _OwnLines) for each in handler.filters) == 1
    finally:
        handler.filters[:] = before
