"""Write a run's metrics as JSON lines and for TensorBoard, without TensorFlow."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cotnet_jax import files
from cotnet_jax.checkpoint.workdir import Workdir

_FLUSH_SECONDS = 30.0


class MetricWriter:
    """Write scalars to a workdir's metrics.jsonl and tensorboard/; only process 0 writes.

    A line of metrics.jsonl is {"step": int, "time": seconds since 1970, NAME: float, ...}; values
    that are not finite are null. The file is only ever appended to: a run that was killed and
    resumed repeats the steps since its checkpoint, and :func:`read_metrics` takes the last value
    of each step. TensorBoard gets the step resumed from, and hides the repeated ones itself.

    Events are written at once rather than by tensorboardX's thread, which after a failed write
    would leave the program waiting for ever.

    Args:
      workdir: the run's folder, made if missing.
      resume_step: last step that the run had finished when it started.
      enabled: False writes nothing, as on the other processes.

    Raises:
      OSError: a file could not be written; the message says which, and what to do.
    """

    def __init__(self, workdir: Workdir, *, resume_step: int = 0, enabled: bool = True):
        self._enabled = enabled and jax.process_index() == 0
        if not self._enabled:
            return
        self._path = workdir.metrics
        events = workdir.tensorboard
        try:
            events.mkdir(parents=True, exist_ok=True)
            self._lines = self._path.open("a+b")
            # A kill may have left half a line: end it, so that it does not spoil the next one.
            self._lines.write(files.missing_newline(self._lines))
            # The name itself has only whole seconds: a quick restart would overwrite the file.
            self._events = EventsWriter(str(events / "events"), f".{time.time_ns()}")
            self._events.write_event(
                Event(
                    step=resume_step + 1,
                    wall_time=time.time(),
                    session_log=SessionLog(status=SessionLog.START),
                )
            )
        except OSError as error:
            raise _explain(error, workdir) from None
        self._flushed = time.monotonic()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one line; ``scalars`` are Python, NumPy or JAX scalars."""
        if not self._enabled:
            return
        now = time.time()
        values = {name: float(value) for name, value in scalars.items()}
        line: dict[str, float | None] = {"step": int(step), "time": round(now, 3)}
        line |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        with self._explain_failure():
            self._lines.write(json.dumps(line).encode() + b"\n")
            self._lines.flush()
            for name, value in values.items():
                self._write_event(step, now, summary.scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Write Markdown to TensorBoard's text tab."""
        if not self._enabled:
            return
        with self._explain_failure():
            self._write_event(step, time.time(), summary.text(name, text))

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3], to TensorBoard's image tab."""
        if not self._enabled:
            return
        with self._explain_failure():
            content = summary.image(name, pixels, dataformats="HWC")
            self._write_event(step, time.time(), content)

    def flush(self) -> None:
        if not self._enabled:
            return
        with self._explain_failure():
            self._lines.flush()
            self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        if not self._enabled:
            return
        self.flush()
        self._close_files()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._close_files()
            raise _explain(error, self._path) from None

    def _close_files(self) -> None:
        self._enabled = False
        for file in (self._lines, self._events):
            # What is still in a buffer cannot be written either, which is reported already.
            with contextlib.suppress(OSError):
                file.close()

    def _write_event(self, step: int, now: float, content) -> None:
        self._events.write_event(Event(step=int(step), wall_time=now, summary=content))


def write_events(folder: Path, step: int, scalars: Mapping[str, float]) -> None:
    """Write scalars of one step for TensorBoard, into a file of their own in ``folder``.

    Nothing else in the folder is hidden, as by a run that resumes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    for name, value in scalars.items():
        content = summary.scalar(name, float(value))
        events.write_event(Event(step=step, wall_time=now, summary=content))
    events.close()


def read_metrics(path: str | os.PathLike) -> dict[int, dict[str, float | None]]:
    """Read {step: {name: value}} from a metrics.jsonl, by ascending step.

    The last value counts where a step has several; half-written lines are left out.
    """
    steps: dict[int, dict[str, float | None]] = {}
    for line in files.read_json_lines(path):
        if isinstance(line.get("step"), int):
            steps.setdefault(line.pop("step"), {}).update(line)
    return dict(sorted(steps.items()))


def _explain(error: OSError, path: Path | Workdir) -> OSError:
    return OSError(
        f"Could not write metrics to {path}: {error.strerror or error}. Free disk space or choose "
        "another --workdir, then start the same command again."
    )
