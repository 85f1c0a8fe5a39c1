"""Several processes as one run: the same numbers, and a clear end when one is lost."""

import json
import os
import signal
import time

import jax
import pytest
from helpers.processes import TrainingRun, free_address, start_python
from helpers.several_processes import (
    FLAGS,
    IMAGES,
    STEPS,
    assert_same_end,
    end,
    lost_message,
    start,
)

from configs import default
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.distributed import initialize, watchdog


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    runs = start(workdir, 1)
    end(runs)
    assert json.loads(runs[0].out)["count"] == IMAGES
    return workdir


def test_two_processes_equal_one_and_only_the_first_prints(alone, tmp_path):
    runs = start(tmp_path, 2)
    _, second = end(runs)
    assert_same_end(tmp_path, alone)
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # A line a step, and one more for each of the four evaluations.
    assert len(metrics) == STEPS + 4
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    spoken = [[line for line in run.out.splitlines() if line[0] == "{"] for run in runs]
    assert [len(lines) for lines in spoken] == [1, 0]
    assert json.loads(spoken[0][0])["count"] == IMAGES
    assert "epoch" not in second and "top-1" not in second, second


def test_sigterm_to_one_process_stops_all_after_the_same_step(alone, tmp_path):
    runs = start(tmp_path, 2)
    runs[0].wait_for("step 13/")
    runs[1].send_signal(signal.SIGTERM)
    last_lines = [said.splitlines()[-1] for said in end(runs, [75, 75])]
    saved = max(int(folder.name) for folder in Workdir(tmp_path).checkpoints.iterdir())
    assert saved >= 13
    for line in last_lines:
        assert f"stopped by SIGTERM: step {saved} of {STEPS} is saved" in line
    (said,) = end(start(tmp_path, 1))
    assert f"Resuming after step {saved} of {STEPS}." in said
    assert_same_end(tmp_path, alone)


def test_a_killed_process_ends_the_other_and_fewer_or_more_go_on(alone, tmp_path):
    # Saved every 10 steps: in the wait for a write it would take JAX's service 20 s to miss it.
    rarely = "--config.checkpoint.every_steps=0"
    runs = start(tmp_path, 2, rarely)
    runs[0].wait_for("step 12/")
    runs[1].kill()
    begin = time.monotonic()
    runs[0].wait(60)
    assert time.monotonic() - begin < 40
    lost_message(end(runs, [watchdog.EXIT_CODE, -signal.SIGKILL])[0])

    (run,) = start(tmp_path, 1, rarely)
    run.wait_for("Resuming after step 10 of 40")
    run.wait_for("step 22/")
    run.kill()
    end([run], [-signal.SIGKILL])
    said, _ = end(start(tmp_path, 2, rarely))
    assert "Resuming after step 20 of 40" in said
    assert_same_end(tmp_path, alone)


@pytest.mark.slow
def test_a_stopped_process_ends_the_other(tmp_path):
    runs = start(tmp_path, 2)
    runs[0].wait_for("step 8/")
    runs[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    runs[0].wait(60)
    assert time.monotonic() - begin < 40
    runs[1].kill()
    message = lost_message(end(runs, [watchdog.EXIT_CODE, -signal.SIGKILL])[0])
    assert "process 0 of 2 waited 10 s for the others" in message


def test_an_error_of_one(tmp_path):
    missing = ["--config.data.name=/nowhere"]
    first, second = end(start(tmp_path, 2, each=[[], missing]), [watchdog.EXIT_CODE, 1])
    lost_message(first)
    assert "error: config.data.name = '/nowhere'" in second


@pytest.mark.slow
def test_an_error_of_all(tmp_path):
    for said in end(start(tmp_path, 2, "--config.data.name=/nowhere"), [1, 1]):
        assert "error: config.data.name = '/nowhere'" in said
        assert "another process" not in said
        assert "Traceback" not in said


def test_an_abort_by_the_coordination_service_is_the_same_error():
    """Of a process that exchanges nothing when the first one is killed."""
    code = """
        import sys, time
        from configs import default
        from cotnet_jax.distributed import initialize
        initialize.initialize(
            default.get_config().distributed,
            coordinator_address=sys.argv[1],
            num_processes=2,
            process_id=int(sys.argv[2]),
        )
        print("joined", flush=True)
        time.sleep(100)
    """
    address = free_address()
    first, second = (start_python(code, address, number) for number in range(2))
    for process in (first, second):
        while "joined" not in process.stdout.readline():
            assert process.poll() is None
    first.kill()
    _, said = second.communicate(timeout=60)
    assert second.returncode == watchdog.EXIT_CODE, said
    assert "process 1 of 2 was aborted by JAX's coordination service" in lost_message(said)
    first.communicate()


def test_other_aborts_and_exceptions_stay_what_they_are():
    code = """
        import os, sys
        import jax
        from cotnet_jax.distributed import initialize, watchdog
        jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
        watchdog.handle_aborts()
        if sys.argv[2] == "abort":
            os.abort()
        with initialize.exit_without_waiting():
            raise KeyError("a mistake")
    """
    runs = [start_python(code, free_address(), what) for what in ("abort", "raise")]
    (_, abort), (_, mistake) = (run.communicate(timeout=60) for run in runs)
    assert [run.returncode for run in runs] == [-signal.SIGABRT, 1], abort + mistake
    assert "error: " not in abort + mistake
    assert mistake.rstrip().endswith("KeyError: 'a mistake'")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error [::1]:99: reset", True),
        ("UNKNOWN: Gloo all-reduce failed: [pair.cc] Connection closed by peer", True),
        ("UNKNOWN: Gloo context initialization failed: Connect timeout [none]", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or ...", True),
        ("UNAVAILABLE: Failed to send RPC to coordination service.", True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: save::1.", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: invalid argument", False),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes", False),
        ("INVALID_ARGUMENT: shapes differ", False),
        ("the coordination service is mentioned", False),
    ],
)
def test_which_errors_are_those_of_a_lost_process(text, lost):
    assert watchdog.is_peer_lost(RuntimeError(text)) == lost
    assert watchdog.is_peer_lost(ValueError(text)) == lost
    try:
        try:
            raise RuntimeError(text)
        except RuntimeError:
            raise ValueError("could not write") from None
    except ValueError as error:
        assert watchdog.is_peer_lost(error) == lost


def test_a_watchdog_leaves_time_for_compilation_and_for_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    settings = default.get_config().distributed
    guarding = watchdog.Watchdog(settings)
    fast, slow = settings.timeout_seconds, settings.slow_timeout_seconds
    assert guarding.remaining() == slow
    for number, _ in enumerate(guarding.guard(range(3))):
        assert guarding.remaining() == (slow if number == 0 else fast)
        now[0] += 7
        assert guarding.remaining() == (slow if number == 0 else fast) - 7
    assert guarding.remaining() == slow


BAD_SETTINGS = [
    ({"num_processes": 2}, ["--coordinator_address=HOST:PORT", "--process_id"]),
    ({"process_id": 0}, ["--coordinator_address=HOST:PORT", "--num_processes"]),
    ({"coordinator_address": "h:1"}, ["--num_processes", "--process_id"]),
    (
        {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
        ["--coordinator_address=host: must be HOST:PORT"],
    ),
    (
        {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
        ["--process_id=2: must be from 0 to --num_processes - 1 = 1"],
    ),
    (
        {"coordinator_address": "h:1", "num_processes": 0, "process_id": -1},
        ["--num_processes=0: must be 1 or more", "--process_id=-1"],
    ),
    (
        {
            "coordinator_address": "h:1",
            "num_processes": 2,
            "process_id": 1,
            "local_device_ids": ["0", "x"],
        },
        ["--local_device_ids=0,x: must be like 0 or 0,1"],
    ),
]


@pytest.fixture
def joined_with(monkeypatch):
    """Keeps JAX from starting its service; the arguments that it would have got."""
    calls = []

    def join(*arguments, **options):
        calls.append((*arguments, options["cluster_detection_method"]))

    monkeypatch.setattr(jax.distributed, "initialize", join)
    monkeypatch.setattr(watchdog, "handle_aborts", lambda: None)
    monkeypatch.setattr(initialize, "_check_devices", lambda count: None)
    monkeypatch.setattr(initialize.logging, "set_verbosity", lambda level: None)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return calls


def join(**given):
    initialize.initialize(default.get_config().distributed, **given)


def test_times_that_are_too_short_are_refused_at_the_start(joined_with):
    settings = default.get_config().distributed
    settings.timeout_seconds = 1
    with pytest.raises(initialize.InitializeError, match="timeout_seconds=1: must be 10 or more"):
        initialize.initialize(settings, coordinator_address="h:1", num_processes=2, process_id=0)


@pytest.mark.parametrize(("given", "messages"), BAD_SETTINGS)
def test_settings_that_are_half_given_or_wrong(joined_with, given, messages):
    with pytest.raises(initialize.InitializeError) as caught:
        join(**given)
    for message in messages:
        assert message in str(caught.value)
    assert not joined_with


def test_flags_that_are_no_numbers():
    (_, error) = TrainingRun("/nowhere", *FLAGS, "--num_processes=two").communicate(timeout=60)
    assert "--num_processes: invalid int value: 'two'" in error
    assert "Traceback" not in error


def slurm(**changes):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        **changes,
    }


def open_mpi(**changes):
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        **changes,
    }


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, None),
        ({}, {"num_processes": 1}, None),
        (slurm(SLURM_NTASKS="1", SLURM_PROCID="0"), {}, None),
        (slurm(), {"num_processes": 1}, None),
        # None leaves the choice to JAX: the GPU with the process's number on its host.
        (slurm(), {}, (None, 4, 1, None, None)),
        (slurm(SLURM_STEP_NUM_NODES="4"), {}, (None, 4, 1, [], None)),
        (slurm(CUDA_VISIBLE_DEVICES="1"), {}, (None, 4, 1, [], None)),
        (slurm(), {"local_device_ids": ["2", "3"]}, (None, 4, 1, [2, 3], None)),
        (
            slurm(),
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
            ("h:1", 2, 0, None, "deactivate"),
        ),
        (open_mpi(), {}, (None, 2, 1, [1], None)),
        (open_mpi(OMPI_COMM_WORLD_LOCAL_SIZE="1"), {}, (None, 2, 1, [], None)),
    ],
)
def test_launchers(joined_with, monkeypatch, environment, given, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join(**given)
    assert joined_with == ([expected] if expected else [])


def test_launchers_that_say_too_little(joined_with, monkeypatch):
    for name, value in open_mpi().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    with pytest.raises(initialize.InitializeError, match="--coordinator_address=HOST:PORT"):
        join()
    join(coordinator_address="h:1")
    assert joined_with == [("h:1", 2, 1, [1], None)]
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "many")
    with pytest.raises(initialize.InitializeError, match=r"environment of Open MPI .*'many'"):
        join(coordinator_address="h:1")
