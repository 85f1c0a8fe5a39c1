"""The main job, run as a user runs it: main.py on digits, shortened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.processes import run_python

from cotnet_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.end_to_end

MAIN = Path(__file__).parents[2] / "main.py"
SHORT = [
    "--config.data.train_split=train[:32]",
    "--config.data.eval_split=test[:12]",
    "--config.batch_size=8",
    "--config.eval.batch_size=8",
    "--config.epochs=3",
    "--config.checkpoint.every_steps=3",
    "--config.log_every_steps=1",
]
STEPS = 12


def command(workdir, *options, config="digits"):
    config = MAIN.parent / "configs" / f"{config}.py"
    return [str(MAIN), f"--config={config}", f"--workdir={workdir}", *options]


def run_line(line):
    script, *arguments = line
    return run_python({"script": script}, *arguments)


def run(workdir, *options, **kwargs):
    return run_line(command(workdir, *options, **kwargs))


def error_of(result) -> str:
    """The one message that a failed command ends with; there must be no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    result = run(workdir, *SHORT)
    assert result.returncode == 0, result.stderr
    return workdir, result


def final_arrays(workdir):
    folder = workdir / "checkpoints" / str(STEPS)
    items = ("weights", "ema", "optimizer")
    return {item: ocp.PyTreeCheckpointer().restore(folder / item) for item in items}


# The short form is test_faults.py's, with a small network.
@pytest.mark.slow
def test_killed_and_started_again_ends_bitwise_the_same(finished, tmp_path):
    """More kills, and other faults, are in test_faults.py."""
    uninterrupted, _ = finished
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, *SHORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while _last_step(tmp_path) < 5:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    result = run(tmp_path, *SHORT)
    assert "Going on after step" in result.stderr
    ours, expected = final_arrays(tmp_path), final_arrays(uninterrupted)
    assert len(jax.tree.leaves(ours)) > 500
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def _last_step(workdir):
    file = workdir / "metrics.jsonl"
    return max(read_metrics(file), default=0) if file.exists() else 0


def test_a_run_leaves_its_figures(finished):
    workdir, result = finished
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["count"] == 12
    assert set(figures) >= {"raw_top1", "raw_top5", "ema_top1", "ema_top5"}
    metrics = read_metrics(workdir / "metrics.jsonl")
    assert set(metrics) == set(range(1, STEPS + 1))
    assert {"loss", "learning_rate", "images_per_second", "data_wait_share"} <= set(metrics[7])
    assert metrics[STEPS]["ema_top1"] == figures["ema_top1"]
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "cotnet_tiny"
    for part in ("epoch 3/3", "step 12/12", "loss", "lr", "img/s", "data", "left"):
        assert part in result.stderr


def test_a_finished_run_says_so_and_evaluates(finished):
    workdir, first = finished
    again = run(workdir, *SHORT)
    assert "This run is finished" in again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def evaluated(finished):
    """The figures of the finished run's best checkpoint."""
    result = run(finished[0], *SHORT, "--mode=evaluate")
    page = re.search(r"look at the report:  (.*)", result.stderr)[1]
    assert Path(page).is_file() and Path(page).is_relative_to(finished[0])
    return json.loads(result.stdout.splitlines()[-1])


def test_evaluate_takes_the_best_checkpoint(finished, evaluated):
    metrics = read_metrics(finished[0] / "metrics.jsonl").values()
    assert evaluated["ema_top1"] == max(m["ema_top1"] for m in metrics if "ema_top1" in m)


def test_training_starts_from_given_weights(finished, evaluated, tmp_path):
    workdir, _ = finished
    only = ["--mode=evaluate", "--no_report"]
    result = run(tmp_path, *SHORT, *only, f"--config.init_from={workdir}")
    assert result.returncode == 0, result.stderr
    given = json.loads(result.stdout.splitlines()[-1])
    assert given["given_top1"] == evaluated["ema_top1"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    result = run(tmp_path, *SHORT, "--config.schedule.warmup_start=1e30")
    message = error_of(result)
    assert re.search(r"error: the loss of step \d is (nan|inf) at learning rate 1e\+30", message)
    assert "No checkpoint was saved yet" in message


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--config.learning_rate=1"], ["learning_rate"]),
        (["--config.model.nam=x"], ["model.nam"]),
        (
            ["--config.batch_size=0", "--config.data.image_size=0", "--config.epochs=0"],
            ["--config.batch_size=0", "--config.data.image_size=0", "--config.epochs=0"],
        ),
        (["--config.batch_size=1"], ["two images for its batch norm"]),
        (["--config.accumulate_steps=3"], ["a positive multiple of 3"]),
        (["--config.batch_size=4096"], ["is more than the 1438 images"]),
        (["--config.model.name=cotnet5"], ["did you mean 'cotnet50'"]),
        (
            ["--config.data.name=imagenet2012"],
            ["imagenet2012", "-m cotnet_jax prepare imagenet"],
        ),
        (["--config.data.name=/nowhere"], ["'/nowhere': no such folder"]),
        (["--config.data.train_split=trian"], ["no split 'trian'"]),
        (["--config.init_from=/nowhere"], ["/nowhere"]),
        (["--mode=test"], ["train|evaluate"]),
        (["extra"], ["unknown argument extra"]),
        (["--wokdir=x"], ["unknown option --wokdir; did you mean --workdir?"]),
        (["--config.epohcs=1"], ["--config.epohcs=1", "did you mean epochs?"]),
        (["--config.init_weights=raw"], ["--config.init_weights is called --config.init_kind now"]),
        (["--weights=raw"], ["--weights: must be the path", "--kind=raw"]),
        (["--weights=/a", "--config.init_from=/b"], ["--weights=/a and --config.init_from=/b"]),
        (["--weights=/nowhere", "--kind=raw"], ["/nowhere"]),
        (["--kind=raw"], ["--kind=raw needs --weights=PATH"]),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, options, messages):
    message = error_of(run(tmp_path / "run", *options))
    for part in messages:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_model_is_refused(finished):
    workdir, _ = finished
    before = sorted(workdir.rglob("*"))
    message = error_of(run(workdir, *SHORT, "--config.model.name=cotnet50"))
    assert "--config.model.name: 'cotnet_tiny' there, 'cotnet50' here" in message
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.slow
def test_fine_tuning_with_frozen_statistics(finished, tmp_path):
    given = finished[0] / "checkpoints" / str(STEPS)
    result = run(
        tmp_path,
        *SHORT,
        f"--weights={given}",
        "--kind=raw",
        "--config.model.freeze_batch_norm=True",
    )
    assert result.returncode == 0, result.stderr
    before, after = final_arrays(finished[0])["weights"], final_arrays(tmp_path)
    for statistics in (after["weights"]["batch_stats"], after["ema"]["batch_stats"]):
        jax.tree.map(np.testing.assert_array_equal, statistics, before["batch_stats"])
    same = jax.tree.map(np.array_equal, after["weights"]["params"], before["params"])
    # Biases in front of a batch norm of batch statistics had no gradient; now all have one.
    assert not any(jax.tree.leaves(same))


def test_only_given_weights_are_evaluated_without_a_workdir(finished):
    def main(*options, config=True):
        # Of a run's checkpoint, its own configuration tells the rest.
        settings = command("", *SHORT) if config else command("")[:1]
        line = [option for option in settings if option != "--workdir="]
        return run_line([*line, *options])

    given = finished[0] / "checkpoints" / str(STEPS)
    result = main("--mode=evaluate", "--no_report", f"--config.init_from={given}")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    metrics = read_metrics(finished[0] / "metrics.jsonl")
    assert figures["given_top1"] == metrics[STEPS]["ema_top1"]
    assert f"--weights={given} IMAGE" in result.stderr
    only = ["--mode=evaluate", "--no_report"]
    by_weights = main(*only, f"--weights={given}", "--kind=raw", config=False)
    assert (
        json.loads(by_weights.stdout.splitlines()[-1])["given_top1"] == (metrics[STEPS]["raw_top1"])
    )
    assert "--workdir=DIR is missing" in error_of(main("--mode=evaluate"))


def test_nothing_to_evaluate(tmp_path):
    assert "missing" in error_of(run(tmp_path, *SHORT, "--mode=evaluate"))
