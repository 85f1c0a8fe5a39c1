"""Running the command that prepares datasets, and reading what it wrote."""

import os
import signal
import subprocess
import sys
import time

import tensorflow_datasets as tfds

RAW = tfds.decode.DeserializeMethod.RAW_BYTES
ENCODED = {"image": tfds.decode.SkipDecoding()}


def dataset_dir(output):
    return output / "imagenet2012" / "5.1.0"


def command_line(source, output):
    module = [sys.executable, "-m", "cotnet_jax.data.prepare", "imagenet"]
    return [*module, f"--source={source}", f"--output={output}", "--workers=2"]


def kill_after(arguments, progress, lines):
    """Starts a command and kills it and its workers once a file has so many lines."""
    process = subprocess.Popen(arguments, start_new_session=True)
    while not progress.exists() or len(progress.read_text().splitlines()) < lines:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
