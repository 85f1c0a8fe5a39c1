"""Several real GPUs as one run, through NCCL; for a machine that has two or more.

python -m pytest tests/distributed/test_gpus.py -m slow -n 4
"""

import hashlib
import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from helpers.several_processes import (
    IMAGES,
    arrays,
    assert_same_end,
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
# What the last process does to itself.
STOP_ITSELF = """
    import os, sys
    if "--process_id={victim}" in sys.argv:
        from cotnet_jax.checkpoint import checkpointer
        from cotnet_jax.data import pipeline

        moment, signal_number = {moment!r}, {signal_number}
        save, eval_batches = checkpointer.Checkpointer.save, pipeline.eval_batches

        def save_and_stop(self, state, metrics=None):
            # It returns while the arrays are being written.
            started = save(self, state, metrics)
            if int(state.step) == 15:
                os.kill(os.getpid(), signal_number)
            return started

        def evaluate_and_stop(*args, **kwargs):
            for number, batch in enumerate(eval_batches(*args, **kwargs)):
                if number == 1:
                    os.kill(os.getpid(), signal_number)
                yield batch

        if moment == "checkpoint":
            checkpointer.Checkpointer.save = save_and_stop
        if moment == "evaluation":
            pipeline.eval_batches = evaluate_and_stop
"""
TAKE_ALL_MEMORY = f"""
    import sys
    if "--process_id={GPUS - 1}" in sys.argv:
        import jax.numpy as jnp
        from cotnet_jax.data import pipeline

        train_batches = pipeline.train_batches

        def take_memory(*args, **kwargs):
            for number, batch in enumerate(train_batches(*args, **kwargs)):
                if number == 12:
                    jnp.zeros(1 << 40, jnp.int8).block_until_ready()
                yield batch

        pipeline.train_batches = take_memory
"""
# Writes checksums of the rows of every batch, and of what was restored.
RECORD = """
    import hashlib, json, sys
    import jax
    import numpy as np
    from cotnet_jax.checkpoint import checkpointer
    from cotnet_jax.data import pipeline
    from cotnet_jax.training.trainer import Trainer

    file = {file!r} + "".join(arg for arg in sys.argv if arg.startswith("--process_id="))
    train_batches, restore = pipeline.train_batches, Trainer.restore

    def digest(array):
        return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()

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
    if moment != "training":
        before = STOP_ITSELF.format(victim=victim, moment=moment, signal_number=int(signal_number))
    runs = start_on_gpus(tmp_path, GPUS, before=before)
    reads = runs[0]
    if moment == "training":
        reads.wait_for("step 12/")
        runs[victim].send_signal(signal_number)
    elif moment == "checkpoint":
        reads.wait_for("step 15/")
    else:
        reads.wait_for("step 10/")
    begin = time.monotonic()
    survivors = [run for run in runs if run is not runs[victim]]
    for run in survivors:
        run.wait(SLOW_SECONDS + 60)
    seconds = time.monotonic() - begin
    runs[victim].kill()
    codes = [watchdog.EXIT_CODE] * GPUS
    codes[victim] = -signal.SIGKILL
    said = end(runs, codes)
    messages = {
        lost_message(text).split(": ")[1]
        for run, text in zip(runs, said, strict=True)
        if run is not runs[victim]
    }
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


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def read_lines(folder, name) -> list[dict]:
    """What the processes recorded, the first process first."""
    files = sorted(folder.glob(f"{name}*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
