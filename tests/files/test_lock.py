"""One process at a time writes to a folder: on one machine, and on several that share it."""

import itertools
import json
import os
import signal
import threading
import time

import pytest
from helpers.processes import start_python

from cotnet_jax.files import lock as lock_module
from cotnet_jax.files.lock import FolderLock, LockedError, LockLostError

pytestmark = pytest.mark.end_to_end

# A lock's process, as another one runs it.
HOLD = """
    import sys, time
    from cotnet_jax.files.lock import FolderLock
    with FolderLock(sys.argv[1], "another run trains", "choose another"):
        print("held", flush=True)
        time.sleep(60)
"""


def make(path, **options):
    return FolderLock(path, "another run trains", "choose another folder", **options)


def write(path, **fields):
    """A lock of a process elsewhere."""
    holder = {
        "token": "t",
        "host": "elsewhere",
        "machine": "another",
        "pid": 7,
        "started": "1",
        "since": "2026-01-01 00:00:00",
        "command": "main.py",
    }
    path.write_text(json.dumps(holder | fields))


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_endless_wait(monkeypatch):
    """A lock that is waited for in vain fails its test, instead of stopping all of them."""
    end, sleep = time.monotonic() + 60, time.sleep

    def sleep_until_the_end(seconds):
        assert time.monotonic() < end, "still waits for the lock"
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep_until_the_end)


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds, and that process."""
    path = tmp_path / "run" / "run.lock"
    # A child of this process, which can leave it unreaped.
    process = start_python(HOLD, path, fresh=True)
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.communicate()


def test_a_second_process_gets_one_line(held):
    path, process = held
    with pytest.raises(LockedError) as error:
        make(path).acquire()
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"another run trains: process {process.pid} on ")
    for part in (" since 20", "Wait for its end or stop it, or choose another folder", str(path)):
        assert part in line


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_is_followed_at_once(held, reaped):
    """Also one whose parent has not asked about it yet, which is still listed."""
    path, process = held
    os.kill(process.pid, signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    start = time.monotonic()
    with make(path):
        assert time.monotonic() - start < 20
    assert os.listdir(path.parent) == []


def test_a_stopped_process_keeps_its_lock(held):
    path, process = held
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LockedError):
        make(path, lease_seconds=0.0).acquire()


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    path = tmp_path / "run.lock"
    write(path, machine=lock_module._machine(), pid=os.getppid(), started="1")
    with make(path):
        pass
    write(path, machine=lock_module._machine(), pid=os.getpid(), started="1")
    with make(path):
        pass


def test_a_process_that_may_not_be_seen_is_not_taken_for_dead(tmp_path, monkeypatch):
    """Of another user, where /proc shows one's own alone."""
    path = tmp_path / "lock"

    def kill(*_):
        raise PermissionError(1, "Operation not permitted")

    write(path, machine=lock_module._machine(), pid=2**22 + 1)
    monkeypatch.setattr(os, "kill", kill)
    threading.Timer(0.2, os.utime, (path, (0, 0))).start()
    with pytest.raises(LockedError):
        make(path, lease_seconds=20).acquire()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with make(tmp_path / "lock"), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        make(tmp_path / "lock").acquire()
    with make(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("machine", ["another", ""])
def test_elsewhere_a_lease_decides(tmp_path, machine):
    path = tmp_path / "lock"
    write(path, machine=machine)
    start = time.monotonic()
    with make(path, lease_seconds=0.5):
        assert time.monotonic() - start >= 0.5
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_sign_of_life_from_elsewhere(tmp_path, jump, monkeypatch):
    """Whatever the clocks show: those of the two machines, and of the file's."""
    path = tmp_path / "lock"
    write(path)
    os.utime(path, (1.8e9 + jump, 1.8e9 + jump))
    now = itertools.count(1.8e9, 1e9)
    monkeypatch.setattr(time, "time", lambda: next(now))
    renewal = threading.Timer(0.7, os.utime, (path, (1.7e9, 1.7e9)))
    renewal.start()
    with pytest.raises(LockedError, match="process 7 on elsewhere since 2026"):
        make(path, lease_seconds=20).acquire()
    assert path.exists()


def test_an_empty_or_torn_lock_is_watched_too(tmp_path):
    for content in (b"", b'{"token": "t', b"\xff\0", b"[]"):
        path = tmp_path / "lock"
        path.write_bytes(content)
        with make(path, lease_seconds=0.3):
            pass


def test_a_lock_is_renewed(tmp_path):
    with make(tmp_path / "lock", lease_seconds=0.5):
        os.utime(tmp_path / "lock", (0, 0))
        wait_until(lambda: (tmp_path / "lock").stat().st_mtime > 0)


def test_who_lost_the_lock_is_told_and_leaves_it_alone(tmp_path):
    path = tmp_path / "lock"
    with make(path, lease_seconds=0.5) as lock:
        lock.check()
        write(path)
        wait_until(lambda: lock._lost_to)
        with pytest.raises(LockLostError, match=r"lost .* to process 7 on elsewhere"):
            lock.check()
    assert json.loads(path.read_text())["pid"] == 7


def test_waiting_for_the_end(tmp_path):
    first = make(tmp_path / "lock")
    first.acquire()
    threading.Timer(0.5, first.release).start()
    with make(tmp_path / "lock", wait=True):
        pass


def test_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with make(tmp_path / "lock"):
        assert os.listdir(tmp_path) == ["lock"]
        with pytest.raises(LockedError):
            make(tmp_path / "lock").acquire()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_no_file_can_be_made_in(tmp_path, monkeypatch):
    def create(path, content):
        # As /proc does.
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(lock_module, "_create", create)
    with pytest.raises(FileNotFoundError, match="lock"):
        make(tmp_path / "lock").acquire()


def test_a_folder_that_was_made_for_the_lock_goes_with_it(tmp_path):
    with make(tmp_path / "a" / "b" / "lock"):
        pass
    assert os.listdir(tmp_path) == []
    with make(tmp_path / "a" / "b" / "lock"):
        (tmp_path / "a" / "file").write_text("")
    assert os.listdir(tmp_path / "a") == ["file"]


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_gets_it(tmp_path, stale):
    code = """
        import sys
        from cotnet_jax.files.lock import FolderLock, LockedError
        path, rounds = sys.argv[1], int(sys.argv[2])
        print("ready", flush=True)
        for round in range(rounds):
            sys.stdin.readline()
            lock = FolderLock(f"{path}/{round}", "busy", "wait")
            try:
                lock.acquire()
                print("held", flush=True)
            except LockedError:
                print("busy", flush=True)
            sys.stdin.readline()
            lock.check()
            lock.release()
    """
    rounds = 4
    if stale:
        for number in range(rounds):
            write(tmp_path / str(number), machine=lock_module._machine(), pid=2**22 + 1)
    processes = [start_python(code, tmp_path, rounds, stdin=True) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    def go_on():
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()

    for _ in range(rounds):
        go_on()
        outcomes = [process.stdout.readline() for process in processes]
        go_on()
        assert sorted(outcomes) == ["busy\n"] * 5 + ["held\n"], outcomes
    for process in processes:
        process.communicate()


def test_an_exit_without_handlers_releases(tmp_path):
    code = """
        import sys
        from cotnet_jax.distributed import watchdog
        from cotnet_jax.files.lock import FolderLock
        FolderLock(sys.argv[1], "busy", "wait").acquire()
        watchdog.exit_now(69)
    """
    process = start_python(code, tmp_path / "lock")
    process.communicate()
    assert process.returncode == 69
    assert os.listdir(tmp_path) == []
