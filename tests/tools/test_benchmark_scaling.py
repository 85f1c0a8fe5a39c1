"""The benchmark of several devices: how its processes are started and end, and its table."""

import csv
import json

import numpy as np
import pytest

from cotnet_jax.tools import arrangements, benchmark_scaling, check_scaling
from cotnet_jax.tools.arrangements import Arrangement, ArrangementError

MEASURED = {
    "batch": 4,
    "dtype": "bfloat16",
    "device": "GPU",
    "jax": "0.11.2",
    "ms": 20.0,
    "exchanging": 0.03,
    "gib": 1.5,
}


@pytest.fixture
def arranged(monkeypatch):
    """Run tests/helpers/arranged.py."""
    monkeypatch.setenv("PYTHONPATH", "tests")

    def run(arrangement, does, seconds):
        return arrangements.run("helpers.arranged", arrangement, {"does": does}, seconds)

    return run


def test_devices_are_shared_by_the_processes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    told = [
        arrangements._environment(Arrangement(4, 2), number, "host:1", {"a": 1})
        for number in range(2)
    ]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in told] == ["3,5", "6,7"]
    assert {each["JAX_NUM_CPU_DEVICES"] for each in told} == {"2"}
    assert [json.loads(each[arrangements._VARIABLE])["number"] for each in told] == [0, 1]


def test_each_number_of_devices_in_one_process_and_in_one_each():
    assert arrangements.powers_of_two(6) == [1, 2, 4]
    listed = [(each.devices, each.processes) for each in arrangements.each_way([1, 2, 4])]
    assert listed == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]


@pytest.mark.end_to_end
def test_one_process_with_two_devices(arranged):
    assert arranged(Arrangement(2, 1), "say", 100) == [1, 2, 2]


@pytest.mark.end_to_end
def test_a_process_that_does_not_end_is_an_error(arranged):
    with pytest.raises(ArrangementError, match="1 device, one process: process 0 was not done in"):
        arranged(Arrangement(1, 1), "hang", 1)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_two_processes_that_are_one_run(arranged):
    assert arranged(Arrangement(4, 2), "say", 100) == [2, 4, 2]
    with pytest.raises(ArrangementError, match="process 1 ended with 1\n  no memory left"):
        arranged(Arrangement(2, 2), "fail", 100)


def test_the_table_tells_what_is_lost(monkeypatch, capsys, tmp_path):
    """Two devices make 1.9 times what one makes; one process each fails; images are waited for."""

    def run(module, arrangement, task, seconds):
        if "workdir" in task:
            return {"images_per_second": 120.0, "data_wait_share": 0.25}
        if arrangement.processes > 1:
            raise ArrangementError(f"{arrangement}: process 1 ended with 1")
        rate = {1: 200.0, 2: 380.0}[arrangement.devices]
        return MEASURED | {"images_per_s": rate}

    monkeypatch.setattr(arrangements, "run", run)
    file = tmp_path / "scaling.csv"
    options = ["--models=cotnet_tiny", "--devices=1,2", "--data=there", f"--csv={file}"]
    benchmark_scaling.main(options)
    _, first, _, second, whole, failed = capsys.readouterr().out.splitlines()
    assert "100.0%" in first and "95.0%" in second and "3.0%" in second
    assert "the whole run: 120 images/s, 25.0% of the time waiting for images" in whole
    assert failed == "2 devices, 2 processes: process 1 ended with 1"
    with file.open(newline="") as lines:
        assert [row["of_linear"] for row in csv.DictReader(lines)] == ["1.0", "0.95"]


@pytest.mark.end_to_end
@pytest.mark.slow
def test_on_the_cores_of_a_cpu(capsys):
    options = ["--models=cotnet_tiny", "--devices=1,2", "--batch_size=2", "--size=32"]
    benchmark_scaling.main(options)
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (1e-3, 1), (float("nan"), 1)])
def test_weights_that_depend_on_the_devices_are_seen(monkeypatch, capsys, change, code):
    def train(task, arrangement, seconds):
        wrong = change if arrangement.devices == 2 and task["implementation"] else 0.0
        return {"a": np.ones(3), "b": np.full(2, 2.0) + wrong}

    monkeypatch.setattr(check_scaling, "train", train)
    assert check_scaling.main(["--model=cotnet_tiny", "--devices=1,2"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and ("0.0e+00" in lines[-1]) == (code == 0)


def test_an_arrangement_that_fails_is_a_line_and_not_a_success(monkeypatch, capsys):
    def train(task, arrangement, seconds):
        if arrangement.processes > 1:
            raise ArrangementError(f"{arrangement}: process 1 ended with 1")
        return {"a": np.ones(3)}

    monkeypatch.setattr(check_scaling, "train", train)
    assert check_scaling.main(["--model=cotnet_tiny", "--devices=1,2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("2 devices, 2 processes: process 1 ended with 1") == 2


def test_a_second_run_that_differs_is_told(monkeypatch, capsys):
    values = iter([1.0, 1.0 + 2e-6, 1.0, 1.0])
    monkeypatch.setattr(
        check_scaling, "train", lambda *_: {"a": np.full(3, next(values), np.float64)}
    )
    assert check_scaling.main(["--model=cotnet_tiny", "--devices=1"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[-1] == "2.0e-06" and second.split()[-1] == "none"


def test_a_batch_that_the_devices_cannot_share_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_scaling.main(["--devices=1,3", "--batch_size=8"])
    assert "--batch_size=8 is not divided by 3" in capsys.readouterr().err


@pytest.mark.end_to_end
@pytest.mark.slow
def test_ten_steps_on_the_cores_of_a_cpu():
    options = ["--model=cotnet_tiny", "--devices=1,2", "--batch_size=4", "--size=32"]
    assert check_scaling.main(options) == 0
