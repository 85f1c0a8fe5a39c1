"""The number of processes and threads that is chosen for a machine."""

import os

import joblib
import pytest

from cotnet_jax.configs import default, digits
from cotnet_jax.data import parallelism
from cotnet_jax.data.parallelism import choose_parallelism

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    def make(cores, memory=1000 * GB):
        monkeypatch.setattr(parallelism, "available_cores", lambda: cores)
        monkeypatch.setattr(parallelism, "available_memory", lambda: memory)

    return make


def data_config(**fields):
    data = default.get_config().data
    data.update(fields)
    return data


@pytest.mark.parametrize(
    ("cores", "rows", "fields", "chosen"),
    [
        (1, 640, {}, (0, 4)),
        (4, 640, {}, (0, 16)),
        (5, 640, {}, (5, 1)),
        (16, 640, {}, (16, 1)),
        # As many as two batches ahead give work to, twice.
        (64, 32, {}, (8, 1)),
        (64, 32, {"prefetch": 4}, (16, 1)),
        (64, 1, {"prefetch": 1}, (2, 1)),
        # Noise takes no time to make.
        (16, 640, {"fake": True}, (0, 16)),
        (16, 640, {"name": "synthetic"}, (0, 16)),
        # What is given is not chosen.
        (16, 640, {"num_workers": 0}, (0, 16)),
        (16, 640, {"num_workers": 3, "num_threads": 2}, (3, 2)),
        (16, 640, {"num_threads": 2}, (16, 2)),
        (2, 640, {"num_workers": 4}, (4, 1)),
    ],
)
def test_what_is_chosen(machine, cores, rows, fields, chosen):
    machine(cores)
    made = choose_parallelism(data_config(**fields), rows)
    assert (made.workers, made.threads) == chosen
    assert rows % made.part == 0


@pytest.mark.parametrize(("memory", "workers"), [(64 * GB, 32), (16 * GB, 16), (4 * GB, 4), (0, 1)])
def test_processes_fit_into_a_quarter_of_the_free_memory(machine, memory, workers):
    machine(32, memory)
    made = choose_parallelism(data_config(), 640)
    assert made.workers == workers
    images = 640 * 2 + 640 * 3
    assert made.num_bytes(640, 224) <= workers * 0.25 * GB + images * 3 * 224**2
    assert made.num_bytes(640, 224) >= workers * 0.25 * GB + 640 * 3 * 3 * 224**2


def test_a_system_that_does_not_tell_its_memory(machine):
    machine(16, float("inf"))
    assert choose_parallelism(data_config(), 640).workers == 16


def test_names(machine):
    machine(16)
    assert str(choose_parallelism(data_config(), 640)) == "16 processes of 1 thread"
    assert str(choose_parallelism(data_config(num_workers=1, num_threads=2), 640)) == (
        "1 process of 2 threads"
    )
    assert str(choose_parallelism(digits.get_config().data, 640)) == "2 threads"


def test_cores_of_this_machine(monkeypatch):
    assert 1 <= parallelism.available_cores() <= len(os.sched_getaffinity(0))
    # Not only where a process is bound to cores.
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    assert parallelism.available_cores() == 3


@pytest.fixture
def files(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:   2000000 kB"],
        "/proc/self/cgroup": ["9:cpu:/job", "0::/job/step"],
    }
    monkeypatch.setattr(parallelism, "_lines", lambda path: files.get(path, []))
    return files


def test_memory_of_this_machine():
    assert 0.01 * GB < parallelism.available_memory() < 100_000 * GB


def test_without_limits_the_free_memory_is_the_hosts(files):
    assert parallelism.available_memory() == 2_048_000_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    files["/sys/fs/cgroup/memory.current"] = ["500000000"]
    assert parallelism.available_memory() == 2_048_000_000
    files.clear()
    assert parallelism.available_memory() == float("inf")


@pytest.mark.parametrize("folder", ["", "/job", "/job/step"])
def test_memory_of_a_container(files, folder):
    files[f"/sys/fs/cgroup{folder}/memory.max"] = ["1500000000"]
    files[f"/sys/fs/cgroup{folder}/memory.current"] = ["1400000000"]
    assert parallelism.available_memory() == 0.1 * GB
    # Of datasets that were read before.
    files[f"/sys/fs/cgroup{folder}/memory.stat"] = [
        "anon 500000000",
        "inactive_file 600000000",
        "active_file 300000000",
    ]
    assert parallelism.available_memory() == GB


def test_memory_of_a_container_of_version_1(files):
    files["/proc/self/cgroup"] = ["4:memory:/job", "0::/"]
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = ["1500000000"]
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = ["1000000000"]
    files["/sys/fs/cgroup/memory/memory.stat"] = ["active_file 1", "total_active_file 500000000"]
    assert parallelism.available_memory() == GB
