"""Profile a few steps of a run, for TensorBoard or xprof."""

from pathlib import Path

import jax
import ml_collections
from absl import logging


class Profiler:
    """Profile the steps that config.profile names, on the first process.

    The profile has everything from their start to their end: the steps on the devices, the host's
    threads, waiting for data, and an evaluation in between. A context manager, whose exit ends a
    profile that is under way. If the profile cannot be written there is a warning, and the run
    continues.

    Args:
      folder: gets plugins/profile/TIME/, where TensorBoard's profile plugin and xprof look.
      window: config.profile: first_step, counted from 1 over the whole run, and steps.
      start_step: steps done before this process started.
      total_steps: steps of the whole run.
    """

    def __init__(
        self,
        folder: Path,
        window: ml_collections.ConfigDict,
        *,
        start_step: int,
        total_steps: int,
    ):
        self._folder = folder
        self._running = False
        end = window.first_step + window.steps
        self._steps = range(max(window.first_step, start_step + 1), min(end, total_steps + 1))
        if window.steps and not self._steps:
            logging.warning(
                "Nothing is profiled: config.profile asks for steps %d to %d, but this process "
                "runs steps %d to %d.",
                *(window.first_step, end - 1, start_step + 1, total_steps),
            )
        if jax.process_index() != 0:
            self._steps = range(0)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before_step(self, step: int) -> None:
        """Start the profile if ``step``, counted from 1, is its first; call it before the step."""
        if self._steps and step == self._steps[0]:
            logging.info("Profiling steps %d to %d.", step, self._steps[-1])
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after_step(self, step: int, outputs) -> None:
        """End the profile if ``step`` is its last, once the step's ``outputs`` are computed."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            logging.warning("The profile could not be written to %s: %s", self._folder, error)
        else:
            logging.info(
                "Wrote the profile: xprof --logdir=%s (or tensorboard, with xprof installed)",
                self._folder,
            )
