"""Figures of a run: JSON lines and TensorBoard, without TensorFlow; and evaluation's counts."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_SECONDS = 30.0


class MetricWriter:
    """Writes scalars to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; only process 0 writes.

    A line of metrics.jsonl is {"step": int, "time": seconds since 1970, NAME: float, ...}; values
    that are not finite are null. The file is only ever appended to: a run that was killed and
    resumed repeats the steps since its checkpoint, and :func:`read_metrics` takes the last figure
    of each step. TensorBoard is told the step resumed from and hides the repeated ones itself.

    Events are written here and now rather than by tensorboardX's thread, which after a failed
    write would leave the program waiting for ever.

    Args:
      workdir: the run's folder, made if missing.
      resume_step: last step that the run had finished when it started.
      enabled: False writes nothing, as on the other processes.

    Raises:
      OSError: a file could not be written; its message says which, and what to do.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int = 0, enabled: bool = True):
        self._enabled = enabled and jax.process_index() == 0
        if not self._enabled:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        events = Path(workdir) / "tensorboard"
        try:
            events.mkdir(parents=True, exist_ok=True)
            self._lines = self._path.open("a+b")
            # A kill may have left half a line: end it, so that the next one stands alone.
            if self._lines.tell() > 0:
                self._lines.seek(-1, os.SEEK_END)
                if self._lines.read(1) != b"\n":
                    self._lines.write(b"\n")
            # By itself the name holds whole seconds: a quick restart would overwrite the file.
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
        """Writes one line; ``scalars`` are Python, NumPy or JAX scalars."""
        if not self._enabled:
            return
        now = time.time()
        values = {name: float(value) for name, value in scalars.items()}
        line = {"step": int(step), "time": round(now, 3)}
        line |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        with self._explain_failure():
            self._lines.write(json.dumps(line).encode() + b"\n")
            self._lines.flush()
            for name, value in values.items():
                self._write_event(step, now, summary.scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes Markdown to TensorBoard's text tab."""
        if not self._enabled:
            return
        with self._explain_failure():
            self._write_event(step, time.time(), summary.text(name, text))

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
            # What is still in a buffer cannot be written either, and has been told of.
            with contextlib.suppress(OSError):
                file.close()

    def _write_event(self, step: int, now: float, content) -> None:
        self._events.write_event(Event(step=int(step), wall_time=now, summary=content))


def read_metrics(path: str | os.PathLike) -> dict[int, dict[str, float | None]]:
    """{step: {name: value}} of a metrics.jsonl, by ascending step.

    Of a figure written twice for one step the last counts; half-written lines are left out.
    """
    steps: dict[int, dict[str, float | None]] = {}
    for line in _parsed_lines(Path(path)):
        steps.setdefault(line.pop("step"), {}).update(line)
    return dict(sorted(steps.items()))


def evaluation_counts(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Sums over a batch that add up, over batches and devices, to exact evaluation figures.

    A class outranks the label's when its logit is larger, or equal with a lower index, as
    ``jax.lax.top_k`` orders them; a logit that is not a number outranks all.

    Args:
      logits: [N, classes], any floating dtype.
      labels: int32 [N]; anything where ``mask`` is False.
      mask: bool [N], False for the padding that fills the last batch.

    Returns:
      {"count", "top1", "top5"} int32 [] and {"loss"} float32 [], the summed cross entropy. With
      fewer than five classes top5 counts the label among all of them.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    outranks = jnp.where(index < labels[:, None], ~(logits < own), ~(logits <= own))
    rank = jnp.sum(outranks & (index != labels[:, None]), axis=-1)
    known = mask & ~jnp.isnan(own[:, 0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "count": jnp.sum(mask, dtype=jnp.int32),
        "top1": jnp.sum(known & (rank < 1), dtype=jnp.int32),
        "top5": jnp.sum(known & (rank < 5), dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(mask, losses, 0), dtype=jnp.float32),
    }


def real_label_counts(logits: jax.Array, real: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch for the accuracy by ReaL labels: the first class must be one of them.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159, section 3.2. The first class is
    that of ``evaluation_counts``' top1; pictures without a label are not counted.

    Args:
      logits: [N, classes], any floating dtype.
      real: int32 [N, K], classes, filled up with -1.
      mask: bool [N], False for the padding that fills the last batch.

    Returns:
      {"real_count", "real_top1"}, int32 [].
    """
    labelled = mask.astype(bool) & (real >= 0).any(-1)
    known = labelled & ~jnp.isnan(logits).any(-1)
    right = (real == jnp.argmax(logits, axis=-1)[:, None]).any(-1)
    return {
        "real_count": jnp.sum(labelled, dtype=jnp.int32),
        "real_top1": jnp.sum(known & right, dtype=jnp.int32),
    }


def _parsed_lines(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for line in file:
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
                yield parsed


def _explain(error: OSError, path: str | os.PathLike) -> OSError:
    return OSError(
        f"Could not write metrics to {path}: {error.strerror or error}. Make room or choose "
        "another --workdir, then start the same command again."
    )
