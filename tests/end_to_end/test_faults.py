"""Whatever stops a run, the same command goes on and ends bitwise as if nothing had happened."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest
from helpers.damage import flip_a_bit, remove, truncate
from helpers.processes import TrainingRun, start_python

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.end_to_end

FLAGS = [
    f"--config={Path(__file__).parents[2] / 'configs/digits.py'}",
    "--config.data.train_split=train[:80]",
    "--config.batch_size=8",
    "--config.data.eval_split=test[:120]",
    "--config.eval.batch_size=2",
    "--config.epochs=4",
    "--config.checkpoint.every_steps=3",
    "--config.log_every_steps=1",
]
STEPS = 40


def start(workdir, *flags, **options):
    return TrainingRun(workdir, *FLAGS, *flags, **options)


def finish(workdir, *flags, **options) -> str:
    """Runs to the end; what was said."""
    run = start(workdir, *flags, **options)
    said = run.end(timeout=400)
    assert run.returncode == 0, said
    return said


def error_of(run) -> str:
    """The last line of a run that ended with an error, which is no traceback."""
    said = f"\n{run.end()}"
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped by SIGTERM, and its last line.

    Sent to all of its processes and repeatedly, as schedulers do.
    """
    workdir = tmp_path_factory.mktemp("stopped")
    run = start(workdir, "--config.data.num_workers=1")
    run.wait_for("step 13/")
    for _ in range(2):
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.02)
    last_line = run.wait_for("stopped by SIGTERM")
    os.killpg(run.pid, signal.SIGTERM)
    said = run.end()
    assert run.returncode == 75, said
    assert said.endswith(last_line)
    assert group_is_gone(run)
    return workdir, last_line.strip()


def assert_same_end(workdir, expected, steps=STEPS):
    """Bitwise the same weights, averages and optimizer, and the same figures of every step."""

    def arrays(workdir):
        folder = Workdir(workdir).checkpoints / str(steps)
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
    assert len(figures(workdir)) == steps


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in Workdir(workdir).checkpoints.iterdir() if p.name.isdigit())


def group_is_gone(run) -> bool:
    """Whether all processes of the run's group have ended within a few seconds."""
    for _ in range(50):
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_sigterm_saves_the_step(stopped):
    workdir, last_line = stopped
    saved = saved_steps(workdir)[-1]
    assert saved >= 13
    assert last_line == (
        f"stopped by SIGTERM: step {saved} of {STEPS} is saved in {Workdir(workdir).checkpoints}; "
        "the same command resumes from there."
    )


def test_after_sigterm_the_same_command_goes_on(uninterrupted, stopped, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    assert f"Resuming after step {saved_steps(workdir)[-1]} of {STEPS}." in finish(workdir)
    assert_same_end(workdir, uninterrupted)


def test_sigterm_before_the_first_step_ends_the_run_at_once(tmp_path):
    run = start(tmp_path, "--config.data.num_workers=1")
    run.wait_for("Config:")
    os.killpg(run.pid, signal.SIGTERM)
    said = run.end()
    assert run.returncode == -signal.SIGTERM
    assert "Traceback" not in said
    assert group_is_gone(run)


def test_sigterm_during_an_evaluation_leaves_it_to_the_next_start(uninterrupted, tmp_path):
    run = start(tmp_path)
    run.wait_for("step 10/")
    run.send_signal(signal.SIGTERM)
    said = run.end()
    assert run.returncode == 75, said
    assert "stopped by SIGTERM: step 10 of 40 is saved" in said
    assert "weights | top-1" not in said
    assert "Evaluating step 10, which was saved but not evaluated." in finish(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_lost_worker_is_one_error(tmp_path):
    run = start(tmp_path, "--config.data.num_workers=1", "--config.epochs=100")
    run.wait_for("step 13/")
    for worker in psutil.Process(run.pid).children():
        if "spawn_main" in str(worker.cmdline()):
            worker.kill()
    said = run.end()
    assert run.returncode == 1, said
    assert "Traceback" not in said, said
    assert "\nerror: a process that decodes images was lost" in said


def test_ctrl_c_is_one_line(tmp_path):
    """A terminal sends SIGINT to all processes of the run."""
    run = start(tmp_path, "--config.data.num_workers=1")
    run.wait_for("step 13/")
    os.killpg(run.pid, signal.SIGINT)
    said = run.end()
    assert run.returncode == 130, said
    assert said.splitlines()[-1] == (
        f"interrupted. The same command resumes from the newest checkpoint in "
        f"{Workdir(tmp_path).checkpoints}."
    )
    assert "Traceback" not in said
    assert group_is_gone(run)


def test_nothing_is_said_of_what_workers_leave():
    left = """
        import multiprocessing, os
        from cotnet_jax.data import workers
        with workers._signals_blocked():
            lock = multiprocessing.get_context("spawn").Lock()
        os._exit(0)
    """
    process = start_python(left)
    # Until the process that cleans up has ended, too.
    assert process.communicate(timeout=60) == ("", "")


@pytest.mark.parametrize("module", ["absl", "cotnet_jax.training.loop"])
def test_ctrl_c_while_main_imports_is_one_line(tmp_path, module):
    interrupt = f"""
        import os, signal, sys
        class Interrupt:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
    """
    run = start(tmp_path, small=False, before=interrupt)
    assert run.end() == "interrupted.\n"
    assert run.returncode == 130


@pytest.mark.slow
def test_ctrl_c_while_the_network_is_compiled_is_one_line(tmp_path):
    interrupt = """
        import os, signal, threading
        import jax
        def listen(event, seconds, **_):
            if "jaxpr_to_mlir" in event and seconds > 0.05:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        jax.monitoring.register_event_duration_secs_listener(listen)
    """
    run = start(tmp_path, small=False, before=interrupt)
    said = run.end()
    assert run.returncode == 130, said
    assert said.splitlines()[-1].startswith("interrupted. The same command resumes from")


def killed_often(
    workdir, kills: int, most_steps: int, *flags, begin: str = "First step", **options
) -> int:
    """Starts a run so often and kills it; how many times a checkpoint was being written.

    Every other kill waits for a write to begin, the others for 1 to ``most_steps`` steps; the first
    one for ``begin`` before that. Each leaves the lock, which the next start takes over.
    """
    moments = random.Random(0)
    during_writes = 0
    for kill in range(kills):
        run = start(workdir, *flags, **options)
        run.wait_for("First step" if kill else begin)
        assert "Took over the lock" in "".join(run.lines) or not kill
        if kill % 2:
            while not unfinished_checkpoints(workdir):
                assert run.poll() is None, run.end()
        else:
            for _ in range(moments.randint(1, most_steps)):
                run.wait_for("| step ")
        time.sleep(moments.uniform(0, 0.03))
        assert run.poll() is None, "the run ended before it was killed"
        run.kill()
        run.end()
        assert group_is_gone(run)
        assert Workdir(workdir).lock.exists()
        during_writes += bool(unfinished_checkpoints(workdir))
    return during_writes


def unfinished_checkpoints(workdir) -> list[Path]:
    return list(Workdir(workdir).checkpoints.glob("*.orbax-checkpoint-tmp*"))


def test_killed_at_random_and_while_writing(uninterrupted, tmp_path):
    # By then a checkpoint is complete.
    killed_often(tmp_path, 2, 8, "--config.data.num_workers=1", begin="step 10/")
    assert "Resuming after step" in finish(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


DAMAGES = [
    (flip_a_bit, "has changed since it was written"),
    pytest.param(truncate, "bytes instead of", marks=pytest.mark.slow),
    pytest.param(remove, "is missing", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    uninterrupted, stopped, tmp_path, damage, problem
):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    *_, before, newest = saved_steps(workdir)
    damage(Workdir(workdir).checkpoints / str(newest))
    said = finish(workdir)
    assert f"step {newest}: " in said
    assert problem in said
    assert f"Using the checkpoint of step {before} instead." in said
    assert f"Resuming after step {before} of {STEPS}." in said
    assert_same_end(workdir, uninterrupted)


def test_a_full_disk_is_one_error_and_loses_nothing(uninterrupted, stopped, tmp_path):
    """A limit on the size of files stands in for a full disk: no privilege is needed."""
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    run = start(workdir)
    run.wait_for("Config:")
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    message = error_of(run)
    assert "Could not write the checkpoint of step" in message
    assert "File too large" in message
    assert "Earlier checkpoints are intact" in message
    assert "start the same command again" in message
    assert not unfinished_checkpoints(workdir)
    assert saved_steps(workdir) == saved_steps(stopped[0])
    finish(workdir)
    assert_same_end(workdir, uninterrupted)


@contextlib.contextmanager
def mounted(folder, options: str):
    """A file system in memory; skips the test where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_file_system_that_is_full(uninterrupted, stopped, tmp_path):
    with mounted(tmp_path / "disk", "size=10m") as disk:
        workdir = shutil.copytree(stopped[0], disk / "run")
        # Room for the log's next lines, but not for a checkpoint.
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filling").write_bytes(bytes(room - 60_000))
        # Of a checkpoint, or of the metrics beside it.
        message = error_of(start(workdir))
        assert "Could not write" in message
        assert "No space left on device" in message
        assert not unfinished_checkpoints(workdir)
        assert saved_steps(workdir) == saved_steps(stopped[0])
        (disk / "filling").unlink()
        finish(workdir)
        assert_same_end(workdir, uninterrupted)


def test_a_read_only_workdir_is_one_error(tmp_path):
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # who may write whatever the folder's permissions say
            folder = stack.enter_context(mounted(tmp_path / "disk", "ro"))
        else:
            folder = tmp_path / "disk"
            folder.mkdir(mode=0o555)
        message = error_of(start(folder / "run"))
    assert f"Could not write to {folder / 'run'}: " in message
    assert "Choose another --workdir." in message


@pytest.mark.slow
def test_killed_twenty_times(tmp_path_factory, tmp_path):
    """The network, too, is that of a user's run."""
    flags = ["--config.data.train_split=train[:32]", "--config.epochs=16"]
    flags += ["--config.checkpoint.every_steps=1", "--config.eval.batch_size=180"]
    uninterrupted = tmp_path_factory.mktemp("uninterrupted")
    finish(uninterrupted, *flags, small=False)
    during_writes = killed_often(tmp_path, 20, 3, *flags, small=False)
    print(f"{during_writes} of 20 kills came while a checkpoint was being written.")
    assert during_writes >= 5
    finish(tmp_path, *flags, small=False)
    assert not Workdir(tmp_path).lock.exists()
    assert_same_end(tmp_path, uninterrupted, steps=64)
