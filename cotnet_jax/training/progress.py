"""Log a line every few steps: the step, the speed, and the time left."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging

# Steps that the host may be ahead of the device. Further ahead, the host would wait for data
# while the device is still busy, and that would be counted as time lost to the input.
_STEPS_AHEAD = 2
# Weight of the newest window in the smoothed rate that the time left is computed from.
_SMOOTHING = 0.3


class Progress:
    """Measure the training loop and log a line every ``every_steps`` steps.

    The loop::

        while True:
            with progress.waiting_for_data():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            metrics = progress.after_step(metrics)
            if metrics:
                writer.write_scalars(progress.step, metrics)
            if evaluation is due:
                with progress.paused():
                    evaluate, save

    Args:
      total_steps: steps of the whole run.
      steps_per_epoch: steps of one epoch.
      batch_size: images a step, over all processes.
      every_steps: steps between two lines.
      steps_per_eval: steps from one evaluation to the next. The time left assumes that each such
        period is :meth:`paused` for as long as the last one, evaluation and saves together.
      start_step: steps done before this process started.
      clock: returns the time in seconds.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        every_steps: int,
        steps_per_eval: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.step = start_step
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._steps_per_eval = steps_per_eval
        self._clock = clock
        self._in_flight: collections.deque[Any] = collections.deque()
        self._first_step = True
        self._seconds_per_step: float | None = None
        # Seconds paused, since the last evaluation ended and in the period before it.
        self._period_paused = 0.0
        self._last_period_paused = 0.0
        self._start_window()

    def expect_compilation(self) -> None:
        """Leave the next step out of the rates, as the first one is."""
        jax.block_until_ready(list(self._in_flight))
        self._first_step = True
        self._start_window()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside, evaluating or saving, out of the rates but not the time left."""
        jax.block_until_ready(list(self._in_flight))
        start = self._clock()
        yield
        seconds = self._clock() - start
        self._paused += seconds
        self._period_paused += seconds
        if self.step % self._steps_per_eval == 0:
            self._last_period_paused, self._period_paused = self._period_paused, 0.0

    def after_step(self, metrics: Mapping[str, jax.Array | float]) -> dict[str, float] | None:
        """Count a step and, every ``every_steps`` steps, log a line.

        Args:
          metrics: scalars of the step, "loss" and "learning_rate" among them; on the device.

        Returns:
          With a line, the metrics as floats, and "images_per_second", "data_wait_share" (0..1)
          and "seconds_left" if they are known; otherwise None.
        """
        self.step += 1
        self._in_flight.append(metrics)
        if len(self._in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
        if self._first_step:
            # It mostly compiles: the first rate is that of the steps after it.
            jax.block_until_ready(metrics)
            seconds = self._clock() - self._window_start - self._waited
            logging.info("First step, with its compilation: %.1f s.", seconds)
            self._first_step = False
            self._start_window()
        if self.step % self._every_steps and self.step != self._total_steps:
            return None
        scalars = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        scalars |= self._close_window()
        logging.info("%s", self._line(scalars))
        return scalars

    def _start_window(self) -> None:
        self._window_start = self._clock()
        self._window_step = self.step
        self._waited = 0.0
        self._paused = 0.0

    def _close_window(self) -> dict[str, float]:
        steps = self.step - self._window_step
        seconds = self._clock() - self._window_start - self._paused
        waited = self._waited
        self._start_window()
        if steps == 0 or seconds <= 0:
            return {}
        newest = seconds / steps
        if self._seconds_per_step is None:
            self._seconds_per_step = newest
        self._seconds_per_step += _SMOOTHING * (newest - self._seconds_per_step)
        evals_left = (self._total_steps // self._steps_per_eval) - (
            self.step // self._steps_per_eval
        )
        return {
            "images_per_second": self._batch_size * steps / seconds,
            "data_wait_share": waited / seconds,
            "seconds_left": (self._total_steps - self.step) * self._seconds_per_step
            + evals_left * self._last_period_paused,
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
    """Return "3 d 04:10" (days, hours, minutes) from a day on, else "4:10:05" (hours first)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}"
