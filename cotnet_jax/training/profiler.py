"""A profile of a few steps of a run, for TensorBoard or xprof."""

from pathlib import Path

import jax
import ml_collections
from absl import logging


class Profiler:
    """Profiles the steps that config.profile names, on the first process.

    Everything between their start and end is in it: the steps on the devices, the host's threads,
    waiting for data, and an evaluation that falls into the window. A context manager: leaving it
    ends a profile that is under way. A profile that cannot be written is told in a warning; the
    run goes on.

    Args:
      folder: gets plugins/profile/TIME/, where TensorBoard's profile plugin and xprof look.
      window: config.profile: first_step, counted from 1 over the whole run, and steps.
      start_step: steps done before this process started.
      total_steps: of the whole run.
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
                "Nothing is profiled: config.profile asks for steps %d to %d, this start has %d "
                "to %d.",
                *(window.first_step, end - 1, start_step + 1, total_steps),
            )
        if jax.process_index() != 0:
            self._steps = range(0)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before_step(self, step: int) -> None:
        """To be called before the step of this number, counted from 1."""
        if self._steps and step == self._steps[0]:
            logging.info("Profiling steps %d to %d.", step, self._steps[-1])
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after_step(self, step: int, results) -> None:
        """To be called with arrays that the step of this number gives."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(results)
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
