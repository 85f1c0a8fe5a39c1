"""The line of progress: rates, waiting, time left."""

import jax.numpy as jnp
import pytest
from absl import logging

from cotnet_jax.training.progress import Progress, format_duration


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    return lines


def run(progress, clock, steps, *, step_seconds=1.0, wait_seconds=0.0, pause_every=None):
    reports = {}
    first = True
    for _ in range(steps):
        with progress.waiting_for_data():
            clock.now += wait_seconds
        clock.now += step_seconds + (50.0 if first and progress._first_step else 0.0)
        first = False
        report = progress.after_step({"loss": jnp.float32(1.5), "learning_rate": 0.1})
        if report:
            reports[progress.step] = report
        if pause_every and progress.step % pause_every == 0:
            with progress.paused():
                clock.now += 20.0
    return reports


def test_rates_leave_out_compilation_and_pauses(lines):
    clock = Clock()
    progress = Progress(
        total_steps=40,
        steps_per_epoch=10,
        batch_size=64,
        every_steps=4,
        steps_per_eval=10,
        clock=clock,
    )
    reports = run(progress, clock, 20, step_seconds=0.75, wait_seconds=0.25, pause_every=10)
    assert list(reports) == [4, 8, 12, 16, 20]
    for report in reports.values():
        assert report["images_per_second"] == pytest.approx(64)
        assert report["data_wait_share"] == pytest.approx(0.25)
        assert report["loss"] == 1.5
    # A step that is compiled in the middle counts as little as the first one.
    progress.expect_compilation()
    (report,) = run(progress, clock, 4, step_seconds=1.0).values()
    assert report["images_per_second"] == pytest.approx(64)
    assert sum("compilation: 5" in line for line in lines) == 2
    # Before the first evaluation its time is not known; then two or three are to come.
    assert reports[8]["seconds_left"] == pytest.approx(32)
    assert reports[12]["seconds_left"] == pytest.approx(28 + 3 * 20)
    assert reports[20]["seconds_left"] == pytest.approx(20 + 2 * 20)
    assert lines[0] == "First step, with its compilation: 50.8 s."
    assert lines[3] == (
        "epoch 2/4 | step 12/40 | loss 1.5000 | lr 0.1 | 64 img/s | data 25.0 % | 0:01:28 left"
    )


def test_the_time_left_counts_evaluations_and_saves(lines):
    clock = Clock()
    progress = Progress(
        total_steps=40,
        steps_per_epoch=10,
        batch_size=1,
        every_steps=10,
        steps_per_eval=20,
        clock=clock,
    )
    # 20 s each after steps 10 (a save), 20 (an evaluation) and 30.
    reports = run(progress, clock, 40, pause_every=10)
    assert reports[20]["seconds_left"] == pytest.approx(20)
    assert reports[30]["seconds_left"] == pytest.approx(10 + 40)


def test_the_time_left_is_smoothed(lines):
    clock = Clock()
    progress = Progress(
        total_steps=100,
        steps_per_epoch=100,
        batch_size=1,
        every_steps=10,
        steps_per_eval=100,
        clock=clock,
    )
    assert run(progress, clock, 10)[10]["seconds_left"] == pytest.approx(90)
    slow = run(progress, clock, 10, step_seconds=2.0)[20]
    assert slow["images_per_second"] == pytest.approx(0.5)
    assert slow["seconds_left"] == pytest.approx(80 * 1.3)


def test_resumed_runs_count_on_and_the_last_step_always_has_a_line(lines):
    clock = Clock()
    progress = Progress(
        total_steps=25,
        steps_per_epoch=10,
        batch_size=1,
        every_steps=10,
        steps_per_eval=10,
        start_step=19,
        clock=clock,
    )
    reports = run(progress, clock, 6)
    assert list(reports) == [20, 25]
    assert "images_per_second" not in reports[20]  # only the compiled step so far
    assert lines[1] == "epoch 2/3 | step 20/25 | loss 1.5000 | lr 0.1"
    assert lines[2].startswith("epoch 3/3 | step 25/25 |")
    assert lines[2].endswith("| 0:00:00 left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (4 * 3600 + 605, "4:10:05"), (273_630, "3 d 04:00")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
