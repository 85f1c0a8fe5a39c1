"""Several processes as one run: the networks themselves, faults at random."""

import collections
import csv
import json
import random
import signal
import time

import jax
import numpy as np
import pytest
from helpers import small_dataset
from helpers.several_processes import (
    STEPS,
    arrays,
    assert_same_end,
    at_batch,
    end,
    figures,
    lost_message,
    run,
    start,
)

from cotnet_jax.distributed import watchdog

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]

# Two devices add two numbers, which gives the same in any order. Gloo adds four in another order
# than one process does, which shows in the last bits. Running statistics are those of two or four
# images a device here, which multiply that.
ROUNDING = {"params": 1e-6, "batch_stats": 1e-5}


def assert_close_end(workdir, expected, step=STEPS):
    """Weights, averages and losses differ by rounding; all images are classified alike."""
    ours, theirs = arrays(workdir, step), arrays(expected, step)
    for item in ("weights", "ema"):
        for kind, tolerance in ROUNDING.items():
            jax.tree.map(
                lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, t, t),
                ours[item][kind],
                theirs[item][kind],
            )
    ours, theirs = figures(workdir), figures(expected)
    assert ours.keys() == theirs.keys()
    for name in ("raw_top1", "ema_top1", "raw_top5", "ema_top5", "count"):
        assert ours[step][name] == theirs[step][name]
    for name in ("loss", "raw_loss", "ema_loss"):
        np.testing.assert_allclose(ours[step][name], theirs[step][name], 1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_ten_steps_of_a_cotnet_equal_those_of_one_process(tmp_path, processes):
    flags = ["--config.epochs=1", "--config.distributed.timeout_seconds=60"]
    flags += ["--config.schedule.warmup_epochs=0", "--config.schedule.peak=1e-4"]
    flags += ["--config.augment.randaugment=rand-m15-mstd0.5-n2"]
    options = {"small": False, "devices": processes}
    alone = run(tmp_path / "1", 1, *flags, **options)
    together = run(tmp_path / "n", processes, *flags, **options)
    assert_close_end(tmp_path / "n", tmp_path / "1", step=10)
    assert alone["count"] == together["count"] == 13
    if processes == 2:
        jax.tree.map(
            np.testing.assert_array_equal, arrays(tmp_path / "n", 10), arrays(tmp_path / "1", 10)
        )


def test_other_numbers_of_processes_go_on_at_the_end_of_an_epoch(tmp_path):
    flags = ["--config.batch_size=16", "--config.data.train_split=train[:160]"]
    flags += ["--config.checkpoint.every_steps=0"]
    run(tmp_path / "uninterrupted", 1, *flags)
    for processes, at in ((2, 12), (1, 22), (2, 32)):
        runs = start(tmp_path / "n", processes, *flags)
        if at > 12:
            runs[0].wait_for(f"Resuming after step {at // 10 * 10 - 10} of 40")
        runs[0].wait_for(f"step {at}/")
        for process in runs:
            process.kill()
        end(runs, [-signal.SIGKILL] * processes)
    said, *_ = end(start(tmp_path / "n", 1, *flags))
    assert "Resuming after step 30 of 40" in said
    assert_same_end(tmp_path / "n", tmp_path / "uninterrupted")


def test_evaluation_alone(tmp_path):
    run(tmp_path, 1, devices=4)
    flags = ["--mode=evaluate", "--config.batch_size=8"]
    results = [run(tmp_path, processes, *flags, devices=4) for processes in (1, 2, 4)]
    # Sums of whole numbers are exact.
    for name in ("raw_top1", "ema_top1", "count"):
        assert results[0][name] == results[1][name] == results[2][name]


def test_random_processes_are_killed_at_random_moments(tmp_path):
    """Also while they start, save and evaluate: the other always ends with a clear message."""
    run(tmp_path / "uninterrupted", 1)
    rng = random.Random(0)
    flags = ["--config.checkpoint.every_steps=1"]
    run(tmp_path / "uninterrupted", 1, *flags)
    said_by_survivors = collections.Counter()
    for _ in range(12):
        runs = start(tmp_path / "n", 2, *flags)
        runs[0].wait_for("processes are connected")
        time.sleep(rng.uniform(0, 3))
        victim = rng.randrange(2)
        runs[victim].kill()
        begin = time.monotonic()
        said = [process.end() for process in runs]
        code = runs[1 - victim].returncode
        assert time.monotonic() - begin < 40
        if code == 0:
            break
        assert code == watchdog.EXIT_CODE, said[1 - victim]
        message = lost_message(said[1 - victim]).splitlines()[0]
        said_by_survivors[message.split("(")[0].split(":")[1]] += 1
    print(dict(said_by_survivors))
    end(start(tmp_path / "n", 2, *flags))
    assert_same_end(tmp_path / "n", tmp_path / "uninterrupted")


def test_a_process_that_hangs_in_python_ends_both(tmp_path):
    """Its threads live on, with them its heartbeat: only the watchdog notices."""
    hang = at_batch("train_batches", 20, "time.sleep(600)")
    runs = start(tmp_path, 2, "--config.distributed.timeout_seconds=10", before=hang)
    begin = time.monotonic()
    for said in end(runs, [watchdog.EXIT_CODE] * 2):
        assert "waited 10 s for the others" in lost_message(said)
    assert time.monotonic() - begin < 60


def test_a_report_of_several_processes_is_that_of_one(tmp_path):
    """Counts are summed over them; predictions and file names come from the one that has them."""
    labels = [number % 10 for number in range(14)]
    names = [str(digit) for digit in range(10)]
    data = small_dataset.write(tmp_path / "mine", labels, class_names=names)
    run(tmp_path / "run", 1, "--config.epochs=1")
    flags = ["--mode=evaluate", "--config.epochs=1", f"--data={data}", "--split=train"]
    for processes in (1, 2):
        output = tmp_path / f"report{processes}"
        run(tmp_path / "run", processes, *flags, f"--output={output}")
    alone, together = (tmp_path / f"report{processes}" for processes in (1, 2))
    ours, theirs = (
        list(csv.DictReader((folder / "predictions.csv").open())) for folder in (together, alone)
    )
    assert [row["file_name"] for row in ours] == [f"{number}.png" for number in range(14)]
    assert [int(row["label"]) for row in ours] == labels
    assert [row["top1"] for row in ours] == [row["top1"] for row in theirs]
    probabilities = [[float(row["top1_probability"]) for row in rows] for rows in (ours, theirs)]
    np.testing.assert_allclose(*probabilities, atol=2e-6)
    ours, theirs = (
        json.loads((folder / "report.json").read_text()) for folder in (together, alone)
    )
    assert ours["environment"]["devices"]["processes"] == 2
    for name in ("confusion_matrix", "classes", "confusions"):
        assert ours[name] == theirs[name]
    assert [each["images"] for each in ours["calibration"]] == [
        each["images"] for each in theirs["calibration"]
    ]
