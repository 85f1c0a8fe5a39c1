"""One line every few steps: where the run is, how fast it goes, and when it will end."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from absl import logging

_T = TypeVar("_T")
# Steps that the host may be ahead of the device. Further ahead, the host would wait for data
# while the device is still busy, and that would be told as time lost to the input.
_STEPS_AHEAD = 2
# Weight of the newest window in the rate from which the time left is told.
_SMOOTHING = 0.3


class Progress:
    """Measures the training loop and logs a line every ``every_steps`` steps.

    The loop::

        for batch in progress.waiting_for(batches):
            state, metrics = train_step(state, batch)
            metrics = progress.after_step(metrics)
            if metrics:
                writer.write_scalars(progress.step, metrics)
            if evaluation is due:
                with progress.aside():
                    evaluate, save

    Args:
      total_steps: steps of the whole run.
      steps_per_epoch: steps of one epoch.
      batch_size: images a step, over all processes.
      every_steps: steps between two lines.
      steps_per_aside: steps from one evaluation to the next. The time left takes each such period
        to spend as long in :meth:`aside` as the last one did, evaluation and saves together.
      start_step: steps done before this process started.
      clock: gives the time in seconds.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        every_steps: int,
        steps_per_aside: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.step = start_step
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._steps_per_aside = steps_per_aside
        self._clock = clock
        self._in_flight: collections.deque[Any] = collections.deque()
        self._first_step = True
        self._seconds_per_step: float | None = None
        self._period_asides = 0.0
        self._last_period_asides = 0.0
        self._start_window()

    def waiting_for(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Yields from ``batches``; the time that this takes is counted as waiting for data."""
        iterator = iter(batches)
        while True:
            start = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += self._clock() - start
            yield batch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluation and saving: left out of the rates, but part of the time left."""
        jax.block_until_ready(list(self._in_flight))
        start = self._clock()
        yield
        seconds = self._clock() - start
        self._asides += seconds
        self._period_asides += seconds
        if self.step % self._steps_per_aside == 0:
            self._last_period_asides, self._period_asides = self._period_asides, 0.0

    def after_step(self, metrics: Mapping[str, jax.Array | float]) -> dict[str, float] | None:
        """Counts a step and, every ``every_steps`` steps, logs a line.

        Args:
          metrics: scalars of the step, "loss" and "learning_rate" among them; on the device.

        Returns:
          With a line: the metrics as floats, and "images_per_second", "data_wait_share" (0..1)
          and "seconds_left" if they are known. Otherwise None.
        """
        self.step += 1
        self._in_flight.append(metrics)
        if len(self._in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
        if self._first_step:
            # Its time is mostly the compiler's; the first rate is that of the steps after it.
            jax.block_until_ready(metrics)
            seconds = self._clock() - self._window_start - self._waited
            logging.info("First step, with its compilation: %.1f s.", seconds)
            self._first_step = False
            self._start_window()
        if self.step % self._every_steps and self.step != self._total_steps:
            return None
        metrics = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        metrics |= self._close_window()
        logging.info("%s", self._line(metrics))
        return metrics

    def _start_window(self) -> None:
        self._window_start = self._clock()
        self._window_step = self.step
        self._waited = 0.0
        self._asides = 0.0

    def _close_window(self) -> dict[str, float]:
        steps = self.step - self._window_step
        seconds = self._clock() - self._window_start - self._asides
        waited = self._waited
        self._start_window()
        if steps == 0 or seconds <= 0:
            return {}
        newest = seconds / steps
        if self._seconds_per_step is None:
            self._seconds_per_step = newest
        self._seconds_per_step += _SMOOTHING * (newest - self._seconds_per_step)
        asides_left = (self._total_steps // self._steps_per_aside) - (
            self.step // self._steps_per_aside
        )
        return {
            "images_per_second": self._batch_size * steps / seconds,
            "data_wait_share": waited / seconds,
            "seconds_left": (self._total_steps - self.step) * self._seconds_per_step
            + asides_left * self._last_period_asides,
        }

    def _line(self, metrics: Mapping[str, float]) -> str:
        epochs = -(-self._total_steps // self._steps_per_epoch)
        epoch = (self.step - 1) // self._steps_per_epoch + 1
        parts = [
            f"epoch {epoch}/{epochs}",
            f"step {self.step}/{self._total_steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['learning_rate']:.4g}",
        ]
        if "images_per_second" in metrics:
            parts += [
                f"{metrics['images_per_second']:.4g} img/s",
                f"data {100 * metrics['data_wait_share']:.1f} %",
                f"{format_duration(metrics['seconds_left'])} left",
            ]
        return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """3 d 04:10 (days, hours, minutes) from a day on, else 4:10:05 (hours, minutes, seconds)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}"
