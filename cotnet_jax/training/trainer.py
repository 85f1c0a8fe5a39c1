"""The services around the training loop: resuming, saving, evaluating, logging, stopping."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from cotnet_jax.checkpoint.checkpointer import open_checkpoints
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.distributed.first_process import run_on_first
from cotnet_jax.distributed.preemption import PreemptedError, PreemptionHandler
from cotnet_jax.distributed.sharding import prefetch_to_device
from cotnet_jax.distributed.watchdog import Watchdog, exit_if_peer_lost
from cotnet_jax.training import extras
from cotnet_jax.training.compiling import say_while_compiling
from cotnet_jax.training.early_stopping import EarlyStopping
from cotnet_jax.training.evaluate import EvalLoop, PredictionsError
from cotnet_jax.training.input_limit import InputLimit
from cotnet_jax.training.metric_writer import MetricWriter, read_metrics
from cotnet_jax.training.profiler import Profiler
from cotnet_jax.training.progress import Progress
from cotnet_jax.training.setup import TrainSetup
from cotnet_jax.training.state import weights_of
from cotnet_jax.training.trackers import Tracker, open_trackers
from cotnet_jax.training.utilization import Utilization


class DivergedError(RuntimeError):
    """A loss, new weights or predictions were not finite."""


class Trainer:
    """Own all that a run needs besides its train step; ``loop.train`` shows how it is used.

    A context manager, whose exit finishes the write under way and ends all threads and workers.

    Args:
      setup: what the configuration resolves to.
      workdir: the run's folder.

    Attributes:
      step: steps done.
    """

    def __init__(self, setup: TrainSetup, workdir: Workdir):
        self.setup = setup
        self.workdir = workdir
        self.step = 0
        self._unchecked: dict[int, tuple[jax.Array, jax.Array]] = {}
        self._progress: Progress | None = None
        self._early_stopping = EarlyStopping(setup.config.early_stopping)

    def __enter__(self) -> "Trainer":
        setup = self.setup
        with contextlib.ExitStack() as stack:
            self._preemption = stack.enter_context(PreemptionHandler(setup.mesh))
            self._watchdog = stack.enter_context(Watchdog(setup.config.distributed))
            self._checkpointer = stack.enter_context(open_checkpoints(self.workdir, setup.config))
            self._eval_loop = stack.enter_context(EvalLoop(setup.eval, self._watchdog))
            # Runs before the checkpointer's exit, which would wait for a process that is gone.
            stack.push(exit_if_peer_lost)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._stack.__exit__(*exception)

    def restore(self, state: TrainState) -> TrainState:
        """Return the state of the newest checkpoint, or ``state`` where there is none.

        Args:
          state: the state before the first step, or its shapes where there are checkpoints.
        """
        restored = self._checkpointer.restore_latest(state)
        state = state if restored is None else restored
        self.step = int(state.step)
        self._metric_writer = self._stack.enter_context(
            MetricWriter(self.workdir, resume_step=self.step)
        )
        self._writers: list[MetricWriter | Tracker] = [
            self._metric_writer,
            *self._stack.enter_context(open_trackers(self.workdir, self.setup.config)),
        ]
        if self.step:
            logging.info("Resuming after step %d of %d.", self.step, self.setup.total_steps)
            self._restore_early_stopping()
        return state

    def why_finished(self) -> str:
        """Return why no step is left to do, as a clause; "" while there is one."""
        if self.step >= self.setup.total_steps:
            return f"it has done its {self.setup.total_steps} steps"
        return self._early_stopping.reason()

    def missed_evaluation(self) -> bool:
        """Return whether the restored step was saved, but not evaluated as it should have been."""
        return bool(
            self.step
            and self.setup.evaluates_after(self.step)
            and not self._checkpointer.metrics(self.step)
        )

    def batches(self) -> Iterator[dict]:
        """Yield the batches of the steps that are left, on the devices, until it is finished."""
        setup, first_step = self.setup, self.step
        self._first_step = first_step
        self._progress = Progress(
            total_steps=setup.total_steps,
            steps_per_epoch=setup.steps_per_epoch,
            batch_size=setup.config.batch_size,
            every_steps=setup.config.log_every_steps,
            steps_per_eval=setup.steps_per_eval,
            start_step=first_step,
        )
        self._utilization = (
            Utilization(setup) if extras.wanted(setup.config.log.extras, "mfu") else None
        )
        self._input_limit = InputLimit(setup.config, setup.config.batch_size // jax.process_count())
        self._profiler = self._stack.enter_context(
            Profiler(
                self.workdir.tensorboard,
                setup.config.profile,
                start_step=first_step,
                total_steps=setup.total_steps,
            )
        )
        batches = self._stack.enter_context(contextlib.closing(setup.train_batches(first_step)))
        # No more are made ready than there are steps.
        batches = itertools.islice(batches, setup.total_steps - first_step)
        batches = prefetch_to_device(setup.mesh, batches)
        # The first step is compiled.
        self._watchdog.extend()
        while not self.why_finished():
            if self.step == setup.head_only_steps > first_step:
                # The step of the whole network is compiled.
                logging.info("From step %d on the whole network is trained.", self.step + 1)
                self._watchdog.extend()
                self._progress.expect_compilation()
            with self._progress.waiting_for_data():
                batch = next(batches)
            self._write_images(batch)
            yield batch
            self._watchdog.reset()
        self._watchdog.extend()

    @contextlib.contextmanager
    def profiled_step(self) -> Iterator[None]:
        """Wrap one call of the train step, to show it in a profile and say when it is compiled."""
        self._profiler.before_step(self.step + 1)
        with (
            self._compiling(),
            jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1),
        ):
            yield

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def _write_images(self, batch: Mapping[str, Any]) -> None:
        """Write images of the first batch and of the first one after each evaluation."""
        due = self.step == self._first_step or self.setup.evaluates_after(self.step)
        if due and extras.wanted(self.setup.config.log.extras, "images"):
            grid = extras.image_grid(batch["image"])
            self._metric_writer.write_image(self.step + 1, "training_images", grid)

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        # The head's own steps at the beginning are another program.
        if self.step in (self._first_step, self.setup.head_only_steps):
            return say_while_compiling("the train step")
        return contextlib.nullcontext()

    def finish_step(self, metrics: dict[str, jax.Array]) -> None:
        """Count a step; every config.log_every_steps steps, log and write its metrics.

        Args:
          metrics: "loss", "finite" and other scalars of the train step, on the devices.

        Raises:
          DivergedError: a loss or weights since the last line were not finite.
        """
        learning_rate = self.setup.learning_rate(self.step)
        metrics = dict(metrics)
        self._unchecked[self.step] = metrics["loss"], metrics.pop("finite")
        self.step += 1
        self._profiler.after_step(self.step, metrics)
        assert self._progress is not None
        line = self._progress.after_step({**metrics, "learning_rate": learning_rate})
        if line:
            self._check_steps()
            self._input_limit.after_line(line.get("data_wait_share", 0.0))
            config = self.setup.config
            line |= extras.measured(config.log.extras, line, config.batch_size)
            if self._utilization:
                line |= self._utilization.measured(self.step, line)
            self._write(self.step, line)

    def save(self, state: TrainState) -> None:
        """Save the state after this step.

        Raises:
          DivergedError: a loss or weights were not finite; nothing is saved.
        """
        with self._paused():
            self._watchdog.extend()
            self._check_steps()
            self._checkpointer.save(state)

    def save_and_evaluate(self, state: TrainState) -> dict[str, float]:
        """Save the state after this step, and evaluate its weights.

        Returns:
          The evaluation's metrics, which are saved with the step.

        Raises:
          DivergedError: a loss, weights or predictions were not finite.
          PreemptedError: SIGTERM came during the evaluation; the step is saved.
        """
        with self._paused():
            self._watchdog.extend()
            self._check_steps()
            # Saved first: whatever stops the run during the evaluation costs only the evaluation.
            self._checkpointer.save(state)
            try:
                metrics = self._eval_loop.run(
                    weights_of(state), after_batch=self._stop_if_preempted
                )
            except PredictionsError as error:
                raise self._diverged(
                    f"the evaluation after step {self.step}: {error}", self.step
                ) from None
            self._write(self.step, metrics)
            self._checkpointer.save(state, metrics)
            self._early_stopping.update(self.step, metrics)
        if reason := self._early_stopping.reason():
            logging.info("Stopped early after step %d: %s.", self.step, reason)
        return metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluate weights without saving anything."""
        return self._eval_loop.run(weights_of(state))

    def should_stop(self) -> bool:
        """Return whether the run is preempted; every process calls this once per step."""
        return self._preemption.should_stop()

    def stop(self) -> None:
        """End a preempted run, whose last step is saved.

        Raises:
          PreemptedError: always.
        """
        self._watchdog.extend()
        self._checkpointer.wait()
        raise PreemptedError(
            f"step {self.step} of {self.setup.total_steps} is saved in "
            f"{self._checkpointer.directory}; the same command resumes from there."
        )

    def _restore_early_stopping(self) -> None:
        """Take note of all evaluations up to this step, as process 0 reads them."""

        def read() -> list[tuple[int, float]]:
            metric, checkpointer = self._early_stopping.metric, self._checkpointer
            # A power cut can have taken lines whose checkpoint is there.
            values = {s: checkpointer.metrics(s).get(metric) for s in checkpointer.all_steps()}
            for step, metrics in read_metrics(self.workdir.metrics).items():
                if values.get(step) is None:
                    values[step] = metrics.get(metric)
            return [
                (step, value)
                for step, value in values.items()
                if step <= self.step and value is not None
            ]

        if self._early_stopping.metric:
            for step, value in run_on_first(read, self.setup.config.distributed.timeout_seconds):
                self._early_stopping.update(step, {self._early_stopping.metric: value})

    def _paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave the time inside out of the progress; before the first step there is none."""
        return self._progress.paused() if self._progress else contextlib.nullcontext()

    def _stop_if_preempted(self) -> None:
        if self._preemption.should_stop():
            self.stop()

    def _check_steps(self) -> None:
        """Raise DivergedError at the first step since the last call that was not finite."""
        for step, (loss, finite) in jax.device_get(self._unchecked).items():
            rate = f"learning rate {self.setup.learning_rate(step):.4g}"
            if not np.isfinite(loss):
                raise self._diverged(f"the loss of step {step + 1} is {loss} at {rate}", step)
            if not finite:
                raise self._diverged(
                    f"step {step + 1} made weights that are not finite, at {rate}", step
                )
        self._unchecked.clear()

    def _diverged(self, what: str, step: int) -> DivergedError:
        """Return the error of a run that failed from the weights after ``step`` steps.

        Their checkpoint, if there is one, is finite, but may be so large that it overflows in the
        network, at any learning rate: it is set aside where there is an older good one, from which
        a step has succeeded.
        """
        self._watchdog.extend()
        checkpointer = self._checkpointer
        has_checkpoint = step in checkpointer.all_steps()
        good = checkpointer.latest_good_step(before=step)
        directory = checkpointer.directory
        if good is not None:
            saved = f"Checkpoint {good} is good in {directory}, and the next start resumes from it"
            if has_checkpoint:
                checkpointer.set_aside(step)
                saved += f"; checkpoint {step}, which the run failed from, is now {step}.diverged"
        elif has_checkpoint:
            saved = (
                f"The only checkpoint in {directory} is {step}: it is finite, but the run failed "
                "from it; if it does so again, choose another --workdir"
            )
        else:
            saved = f"No checkpoint was saved yet in {directory}"
        return DivergedError(
            f"{what}. {saved}. Try a lower --config.schedule.peak or "
            "--config.optimizer.clip_norm=1; to resume with it, add "
            "--config.resume.allow_changes=schedule,optimizer."
        )
