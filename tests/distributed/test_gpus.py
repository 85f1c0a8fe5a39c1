"""Several real GPUs as one run, through NCCL; for a machine that has two or more.

python -m pytest tests/distributed/test_gpus.py -m slow -n 4
"""

import json
import shutil
import signal
import subprocess
import time

import jax
import pytest
from helpers.several_processes import (
    IMAGES,
    arrays,
    assert_same_end,
    at_batch,
    digest,
    end,
    lost_message,
    start,
)

from cotnet_jax.checkpoint.checkpointer import find_steps
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.distributed import watchdog


def count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True).stdout
    return len([line for line in listed.splitlines() if line.startswith("GPU ")])


GPUS = min(4, count_gpus())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.end_to_end,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs or more"),
]

# Limits of the watchdog: for a step, and for what takes longer.
SECONDS, SLOW_SECONDS = 10, 60
FLAGS = [
    f"--config.distributed.timeout_seconds={SECONDS}",
    f"--config.distributed.slow_timeout_seconds={SLOW_SECONDS}",
]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    # Several runs share the GPUs.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # The same bits, whichever process compiled first.
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0",
}
LONGEST_START = 300
# The step at which a process is lost, by what it is at.
STEP_OF = {"training": 12, "checkpoint": 15, "evaluation": 10}
STOP_IN_CHECKPOINT = """
    import os, sys
    from cotnet_jax.checkpoint.checkpointer import Checkpointer

    def save_and_stop(self, state, metrics=None, save=Checkpointer.save):
        # It returns while the arrays are being written.
        started = save(self, state, metrics)
        if int(state.step) == {step}:
            os.kill(os.getpid(), {signal_number})
        return started

    if "--process_id={victim}" in sys.argv:
        Checkpointer.save = save_and_stop
"""
TAKE_ALL_MEMORY = at_batch(
    "train_batches",
    12,
    "import jax; jax.numpy.zeros(1 << 40, 'int8').block_until_ready()",
    GPUS - 1,
)
# Writes checksums of the rows of every batch, and of what was restored.
RECORD = """
    import json, sys
    import jax
    from helpers.several_processes import digest
    from cotnet_jax.checkpoint import checkpointer
    from cotnet_jax.data import pipeline
    from cotnet_jax.training.trainer import Trainer

    file = {file!r} + "".join(arg for arg in sys.argv if arg.startswith("--process_id="))
    train_batches, restore = pipeline.train_batches, Trainer.restore

    def write(**values):
        with open(file, "a") as lines:
            print(json.dumps(values), file=lines)

    def recorded(*args, start_step, **kwargs):
        batches = train_batches(*args, start_step=start_step, **kwargs)
        for step, batch in enumerate(batches, start_step):
            rows = zip(batch["image"], batch["label"])
            write(step=step, rows=[digest(image) + str(label) for image, label in rows])
            yield batch

    def restored(self, state):
        state = restore(self, state)
        if self.step:
            leaves = jax.tree.leaves(jax.device_get(checkpointer._to_items(state)))
            write(restored=self.step, digests=sorted(digest(leaf) for leaf in leaves))
        return state

    pipeline.train_batches, Trainer.restore = recorded, restored
"""


def start_on_gpus(workdir, processes, *flags, gpus=None, **options):
    """One run of so many processes, which share the first ``gpus``, by default one each."""
    each = (gpus or processes) // processes
    numbers = [range(number * each, (number + 1) * each) for number in range(processes)]
    mine = [["--local_device_ids=" + ",".join(map(str, of_one))] for of_one in numbers]
    environment = ENVIRONMENT
    if processes == 1:
        # Without others there is nothing that the flag would tell.
        mine = []
        environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers[0]))}
    return start(
        workdir,
        processes,
        *FLAGS,
        *flags,
        each=mine,
        devices=processes,
        small=False,
        environment=environment,
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of one process for each GPU."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    runs = start_on_gpus(workdir, GPUS)
    end(runs, timeout=LONGEST_START)
    assert json.loads(runs[0].out.splitlines()[-1])["count"] == IMAGES
    return workdir


@pytest.mark.parametrize(
    ("signal_number", "moment", "victim"),
    [
        (signal.SIGKILL, "training", GPUS - 1),
        (signal.SIGKILL, "training", 0),
        (signal.SIGKILL, "checkpoint", GPUS - 1),
        (signal.SIGKILL, "evaluation", GPUS - 1),
        (signal.SIGSTOP, "training", GPUS - 1),
        (signal.SIGSTOP, "checkpoint", GPUS - 1),
        (signal.SIGSTOP, "evaluation", GPUS - 1),
    ],
)
def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    uninterrupted, tmp_path, signal_number, moment, victim
):
    before = ""
    if moment == "checkpoint":
        before = STOP_IN_CHECKPOINT.format(
            step=STEP_OF[moment], victim=victim, signal_number=int(signal_number)
        )
    elif moment == "evaluation":
        stop = f"os.kill(os.getpid(), {int(signal_number)})"
        before = at_batch("eval_batches", 1, stop, victim)
    runs = start_on_gpus(tmp_path, GPUS, before=before)
    runs[0].wait_for(f"step {STEP_OF[moment]}/")
    if moment == "training":
        runs[victim].send_signal(signal_number)
    begin = time.monotonic()
    survivors = [number for number in range(GPUS) if number != victim]
    for number in survivors:
        runs[number].wait(SLOW_SECONDS + 60)
    seconds = time.monotonic() - begin
    runs[victim].kill()
    codes = [watchdog.EXIT_CODE] * GPUS
    codes[victim] = -signal.SIGKILL
    said = end(runs, codes)
    messages = {lost_message(said[number]).split(": ")[1] for number in survivors}
    print(f"{signal_number.name} in {moment}, process {victim}: {seconds:.0f} s, {messages}")
    assert seconds < (SECONDS if moment == "training" else SLOW_SECONDS) + 30
    end(start_on_gpus(tmp_path, GPUS), timeout=LONGEST_START)
    assert_same_end(tmp_path, uninterrupted)


def test_a_process_without_memory_says_so_and_ends_the_others(tmp_path):
    runs = start_on_gpus(tmp_path, GPUS, before=TAKE_ALL_MEMORY)
    codes = [watchdog.EXIT_CODE] * (GPUS - 1) + [1]
    *others, said = end(runs, codes, timeout=LONGEST_START)
    print(said.splitlines()[-3:], {lost_message(text) for text in others})
    assert "error: the memory of a device does not suffice" in said
    assert "Traceback" not in said


def test_fewer_and_more_gpus_go_on_in_the_middle_of_an_epoch(tmp_path):
    """The same batches, and what is restored has the bits of the checkpoint."""
    # One epoch of 100 steps.
    flags = ["--config.data.train_split=train[:800]", "--config.epochs=1"]
    flags += ["--config.schedule.warmup_epochs=0"]
    record = RECORD.format(file=str(tmp_path / "alone"))
    end(start_on_gpus(tmp_path / "1", 1, *flags, before=record), timeout=LONGEST_START)
    alone = {line["step"]: line["rows"] for line in read_lines(tmp_path, "alone")}
    resumed, saved = 0, []
    for part, (processes, gpus) in enumerate([(GPUS, GPUS), (2, 2), (1, 1), (1, 2), (GPUS, GPUS)]):
        record = RECORD.format(file=str(tmp_path / f"part{part}"))
        runs = start_on_gpus(tmp_path / "n", processes, *flags, gpus=gpus, before=record)
        if part:
            line = runs[0].wait_for("Resuming after step")
            earlier, resumed = resumed, int(line.split("Resuming after step ")[1].split()[0])
            assert earlier < resumed < 100
        runs[0].wait_for(f"step {resumed + 10}/")
        for run in runs:
            run.kill()
        end(runs, [-signal.SIGKILL] * processes)
        lines = read_lines(tmp_path, f"part{part}")
        for step in range(resumed, resumed + 10):
            rows = [line["rows"] for line in lines if line.get("step") == step]
            assert [row for of_one in rows for row in of_one] == alone[step]
        restored = [line for line in lines if "restored" in line]
        assert [line["restored"] for line in restored] == [resumed] * (processes if part else 0)
        assert all(line["digests"] == saved for line in restored)
        leaves = jax.tree.leaves(latest_arrays(tmp_path / "n"))
        saved = sorted(digest(leaf) for leaf in leaves)


def test_evaluation_counts_each_image_once(uninterrupted):
    """The split is not a multiple of the batch, nor of the number of GPUs."""
    found = []
    for processes, gpus in ((1, 1), (1, GPUS), (GPUS, GPUS)):
        runs = start_on_gpus(uninterrupted, processes, "--mode=evaluate", gpus=gpus)
        end(runs, timeout=LONGEST_START)
        found.append(json.loads(runs[0].out.splitlines()[-1]))
    for figures in found:
        assert figures["count"] == IMAGES
        for name in ("raw_top1", "ema_top1", "raw_top5", "ema_top5"):
            assert figures[name] == found[0][name]


def latest_arrays(workdir):
    """All that the newest checkpoint holds, which is the one that the next start reads."""
    return arrays(workdir, max(find_steps(Workdir(workdir).checkpoints)))


def read_lines(folder, name) -> list[dict]:
    """What the processes recorded, the first process first."""
    files = sorted(folder.glob(f"{name}*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
