"""A second run in the same workdir, and a workdir below ``~``, which no shell has expanded."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers.processes import TrainingRun

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.end_to_end
FLAGS = [
    f"--config={ROOT / 'configs/digits.py'}",
    "--config.data.train_split=train[:80]",
    "--config.data.eval_split=test[:8]",
    "--config.batch_size=8",
    "--config.eval.batch_size=8",
    "--config.epochs=2",
    "--config.checkpoint.every_steps=1",
    "--config.log_every_steps=1",
]


def stop(run):
    """Stop a process, and wait for all its threads: what the kernel does for them is finished."""
    run.send_signal(signal.SIGSTOP)
    end = time.monotonic() + 60
    while not all(
        "State:\tT" in status.read_text()
        for status in Path(f"/proc/{run.pid}").glob("task/*/status")
    ):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_second_run_is_one_line_and_a_killed_one_is_followed_at_once(tmp_path, monkeypatch):
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Stopped in the middle, so that the second one finds it at work.
    first = TrainingRun("~/run", *FLAGS)
    first.wait_for("| step 4/20")
    stop(first)
    workdir = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}

    second = TrainingRun(workdir, *FLAGS)
    said = second.end()
    assert second.returncode == 1, said
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message.startswith(f"error: another run is at work in {workdir}: process {first.pid} ")
    assert "choose another --workdir" in message
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {workdir}

    first.kill()
    first.end()
    (workdir / ".writing-1-config.json").write_text("{")
    third = TrainingRun("~/run", *FLAGS, "--config.data.num_threads=3")
    said = third.end()
    assert third.returncode == 0, said
    assert "Took over the lock" in said
    assert "Resuming after step" in said
    assert "Changed since the last start: --config.data.num_threads: 2 there, 3 here." in said
    assert not (ROOT / "~").exists()
    names = {path.name for path in workdir.iterdir()}
    assert {"checkpoints", "config.json", "metrics.jsonl", "starts.jsonl", "tensorboard"} <= names
    assert not {name for name in names if name.startswith(".") or "lock" in name}
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["config"]["data"]["num_threads"] for start in starts] == [2, 3]
