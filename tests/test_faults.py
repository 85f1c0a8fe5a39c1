"""Whatever stops a run, the same command goes on and ends bitwise as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import TrainingRun

from cotnet_jax.checkpoint import CHECKPOINTS
from cotnet_jax.metrics import read_metrics

FLAGS = [
    f"--config={Path(__file__).parents[1] / 'configs/digits.py'}",
    "--config.data.train_split=train[:80]",
    "--config.batch_size=8",
    "--config.eval.batch_size=2",
    "--config.epochs=4",
    "--config.checkpoint.every_steps=3",
    "--config.log_every_steps=1",
]
STEPS = 40


def start(workdir, *flags):
    return TrainingRun(workdir, *FLAGS, *flags)


def finish(workdir, *flags) -> str:
    """Runs to the end; what was said."""
    run = start(workdir, *flags)
    said = run.end()
    assert run.returncode == 0, said
    return said


def error_of(run) -> str:
    """The last line of a run that ended with an error, which is no traceback."""
    said = run.end()
    assert run.returncode == 1, said
    assert "Traceback" not in said, said
    message = said[said.index("\nerror: ") :]
    assert len(message.splitlines()) == 2, said
    return message


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(workdir)
    return workdir


def assert_same_end(workdir, expected):
    """Bitwise the same weights, averages and optimizer, and the same figures of every step."""

    def arrays(workdir):
        folder = workdir / CHECKPOINTS / str(STEPS)
        items = ("weights", "ema", "optimizer")
        return {item: ocp.PyTreeCheckpointer().restore(folder / item) for item in items}

    def figures(workdir):
        metrics = read_metrics(workdir / "metrics.jsonl")
        timed = ("time", "images_per_second", "data_wait_share", "seconds_left")
        return {
            step: {name: value for name, value in line.items() if name not in timed}
            for step, line in metrics.items()
        }

    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(expected))
    assert figures(workdir) == figures(expected)
    assert len(figures(workdir)) == STEPS


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / CHECKPOINTS).iterdir() if p.name.isdigit())


def group_is_gone(run) -> bool:
    """Whether all processes of the run's group have ended within a few seconds."""
    for _ in range(50):
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_sigterm_saves_the_step_and_the_same_command_goes_on(uninterrupted, tmp_path):
    """Sent to all processes of the run and twice, as schedulers do."""
    run = start(tmp_path, "--config.data.num_workers=1")
    run.wait_for("step 13/")
    for _ in range(2):
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.02)
    *_, last = run.end().splitlines()
    assert run.returncode == 75
    saved = saved_steps(tmp_path)[-1]
    assert saved >= 13
    assert last == (
        f"stopped by SIGTERM: step {saved} of {STEPS} is saved in {tmp_path / CHECKPOINTS}; "
        "the same command goes on from there."
    )
    assert group_is_gone(run)
    assert f"Going on after step {saved} of {STEPS}." in finish(tmp_path)
    assert_same_end(tmp_path, uninterrupted)
