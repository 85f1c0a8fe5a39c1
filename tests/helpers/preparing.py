"""Run the command that prepares datasets, and read what it wrote."""

import os
import signal
import subprocess
import sys
import time

import tensorflow_datasets as tfds

from cotnet_jax.data import imagenet

RAW = tfds.decode.DeserializeMethod.RAW_BYTES
ENCODED = {"image": tfds.decode.SkipDecoding()}


def dataset_dir(output):
    return output / imagenet.NAME / imagenet.VERSION


def command_line(source, output):
    module = [sys.executable, "-m", "cotnet_jax.data.prepare", "imagenet"]
    return [*module, f"--source={source}", f"--output={output}", "--workers=2"]


def kill_after(arguments, progress, lines):
    """Start a command, and kill it and its workers once a file has so many lines."""
    process = subprocess.Popen(arguments, start_new_session=True)
    while not progress.exists() or len(progress.read_text().splitlines()) < lines:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
