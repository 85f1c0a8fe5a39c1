"""Runs of several processes over loopback, and what they left."""

import hashlib
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.training.metric_writer import read_metrics
from helpers.processes import TrainingRun, free_address

# The test split is not a multiple of any batch, nor does the batch fill all processes at its end.
FLAGS = [
    f"--config={Path(__file__).parents[2] / 'configs/digits.py'}",
    "--config.data.train_split=train[:80]",
    "--config.data.eval_split=test[:13]",
    "--config.batch_size=8",
    "--config.eval.batch_size=8",
    "--config.epochs=4",
    "--config.checkpoint.every_steps=3",
    "--config.log_every_steps=1",
    "--config.distributed.timeout_seconds=10",
]
STEPS = 40
IMAGES = 13


def start(workdir, processes, *flags, devices=2, each=(), **options):
    """One run of so many processes, with ``devices`` in all; ``each`` are flags of one alone."""
    address = free_address()
    return [
        TrainingRun(
            workdir,
            *FLAGS,
            *flags,
            *(each[number] if each else ()),
            f"--coordinator_address={address}",
            f"--num_processes={processes}",
            f"--process_id={number}",
            devices=devices // processes,
            stdout=subprocess.PIPE,
            **options,
        )
        for number in range(processes)
    ]


def at_batch(batches: str, number: int, action: str, process: int | None = None) -> str:
    """Code for ``before``: act when a batch is asked for, in one process or in all.

    Args:
      batches: the function of cotnet_jax.data.pipeline that makes them.
      number: of the batch, from 0.
      action: a statement, which may use os, sys and time.
    """
    return f"""
        import os, sys, time
        from cotnet_jax.data import pipeline

        def act_at_batch(*args, make=pipeline.{batches}, **kwargs):
            for number, batch in enumerate(make(*args, **kwargs)):
                if number == {number}:
                    {action}
                yield batch

        if {process} is None or "--process_id={process}" in sys.argv:
            pipeline.{batches} = act_at_batch
    """


def digest(array) -> str:
    """A checksum of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def end(runs, codes=None, timeout=120) -> list[str]:
    """Waits for all; what each said. They must end with ``codes``, by default with 0."""
    said = [run.end(timeout) for run in runs]
    assert [run.returncode for run in runs] == (codes or [0] * len(runs)), "\n".join(said)
    return said


def run(workdir, processes, *flags, **options) -> dict:
    """A whole run that ends well; the figures that it prints."""
    runs = start(workdir, processes, *flags, **options)
    end(runs, timeout=900)
    return json.loads(runs[0].out.splitlines()[-1])


def lost_message(said) -> str:
    """The one line with which a process tells that another one is lost; it is the last."""
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1, said
    message = said[said.index("error: ") :]
    assert "start the same command again on all of them" in message
    return message


def arrays(workdir, step=STEPS):
    """All that a checkpoint holds, whatever devices wrote it."""

    def read(folder):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(folder, restore_args=wanted)

    folder = Workdir(workdir).checkpoints / str(step)
    return {item: read(folder / item) for item in ("weights", "ema", "optimizer")}


def figures(workdir):
    """{step: figures}, without those that tell of time."""
    timed = ("time", "images_per_second", "data_wait_share", "seconds_left")
    return {
        step: {name: value for name, value in line.items() if name not in timed}
        for step, line in read_metrics(workdir / "metrics.jsonl").items()
    }


def assert_same_end(workdir, expected):
    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(expected))
    assert figures(workdir) == figures(expected)
