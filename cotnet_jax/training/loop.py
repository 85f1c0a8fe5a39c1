"""The training loop: from a configuration and a workdir to trained weights."""

import contextlib
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from cotnet_jax.checkpoint.checkpointer import (
    CHECKPOINTS,
    Checkpointer,
    has_steps,
    open_checkpoints,
    weight_kinds,
)
from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.checkpoint.workdir import check_workdir, write_run_metadata
from cotnet_jax.distributed import sharding
from cotnet_jax.distributed.preemption import PreemptedError, PreemptionHandler
from cotnet_jax.distributed.watchdog import Watchdog, end_if_lost
from cotnet_jax.training import evaluate
from cotnet_jax.training.metric_writer import MetricWriter
from cotnet_jax.training.mixup import mix_batch
from cotnet_jax.training.optimizer import ema_step_size_schedule, make_optimizer
from cotnet_jax.training.profiler import Profiler
from cotnet_jax.training.progress import Progress
from cotnet_jax.training.setup import TrainSetup, set_up_training
from cotnet_jax.training.step import make_train_step
from cotnet_jax.weights import load


class DivergedError(RuntimeError):
    """A loss was not finite."""


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains to the end of the last epoch, going on where an earlier run in workdir stopped.

    Args:
      config: as in configs/default.py.
      workdir: gets checkpoints/, metrics.jsonl, tensorboard/, config.json, parameters.txt.

    Returns:
      The eval_metrics of the last evaluation, as ``evaluate.evaluate`` gives them, of "raw" weights
      and, where they are on, of the EMA "ema".

    Raises:
      ValueError: the configuration or the dataset is not usable; WorkdirError: the workdir holds
        another run.
      DivergedError: a loss was not finite; says where, and which checkpoint is good.
      CheckpointError, OSError: something could not be written; earlier checkpoints are intact.
      PreemptedError: SIGTERM came after the first step of this process, and all is saved.
    """
    workdir = Path(workdir)
    experiment = set_up_training(config)
    check_workdir(workdir, config)
    optimizer = make_optimizer(config.optimizer, experiment.rates, experiment.steps_per_epoch)
    # A run that goes on takes its weights from its checkpoints; their shapes are enough till then.
    begin = abstract_train_state if has_steps(workdir / CHECKPOINTS) else create_train_state
    state = begin(experiment, optimizer)
    write_run_metadata(
        workdir,
        config=config,
        params=state.params,
        mesh=experiment.mesh,
        class_names=experiment.train_source.class_names,
    )
    train_step = make_step(experiment, optimizer)
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(PreemptionHandler(experiment.mesh))
        watchdog = stack.enter_context(Watchdog(config.distributed))
        checkpointer = stack.enter_context(open_checkpoints(workdir, config))
        evaluate_all = stack.enter_context(evaluate.evaluating(experiment, watchdog))
        # Comes before the checkpointer's exit, which would wait for a process that is gone.
        stack.push(end_if_lost)
        restored = checkpointer.restore_latest(state)
        state = state if restored is None else restored
        first_step = int(state.step)
        writer = stack.enter_context(MetricWriter(workdir, resume_step=first_step))

        def leave(step: int):
            watchdog.extend()
            checkpointer.wait()
            raise PreemptedError(
                f"step {step} of {experiment.total_steps} is saved in {checkpointer.directory}; "
                "the same command goes on from there."
            )

        def save_and_evaluate(step: int) -> dict[str, float]:
            watchdog.extend()
            # Saved first: what stops the run during the evaluation costs the evaluation alone.
            checkpointer.save(state)
            eval_metrics = evaluate_all(
                named_weights(state), after_batch=lambda: preemption.should_stop() and leave(step)
            )
            writer.write_scalars(step, eval_metrics)
            checkpointer.save(state, eval_metrics)
            return eval_metrics

        eval_metrics = {}
        if first_step:
            logging.info("Going on after step %d of %d.", first_step, experiment.total_steps)
            if experiment.evaluates_after(first_step) and not checkpointer.metrics(first_step):
                logging.info("Evaluating step %d, which was saved but not evaluated.", first_step)
                eval_metrics = save_and_evaluate(first_step)
        if first_step >= experiment.total_steps:
            logging.info("This run is finished; evaluating its last weights.")
            return eval_metrics or evaluate_all(named_weights(state))

        progress = Progress(
            total_steps=experiment.total_steps,
            steps_per_epoch=experiment.steps_per_epoch,
            batch_size=config.batch_size,
            every_steps=config.log_every_steps,
            steps_per_aside=experiment.steps_per_eval,
            start_step=first_step,
        )
        profiler = Profiler(
            workdir / "tensorboard",
            config.profile,
            start_step=first_step,
            total_steps=experiment.total_steps,
        )
        stack.enter_context(profiler)
        batches = stack.enter_context(contextlib.closing(experiment.train_batches(first_step)))
        losses = {}
        left = itertools.islice(batches, experiment.total_steps - first_step)
        left = watchdog.guard(sharding.prefetch_to_device(experiment.mesh, left))
        for batch in progress.waiting_for(left):
            rate = experiment.learning_rate(progress.step)
            profiler.before_step(progress.step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=progress.step + 1):
                state, metrics = train_step(state, batch)
            profiler.after_step(progress.step + 1, metrics)
            losses[progress.step] = metrics["loss"]
            line = progress.after_step({**metrics, "learning_rate": rate})
            step = progress.step
            if line:
                check_finite(losses, experiment, checkpointer)
                writer.write_scalars(step, line)
            asked_to_stop = preemption.should_stop()
            if experiment.evaluates_after(step):
                with progress.aside():
                    check_finite(losses, experiment, checkpointer)
                    eval_metrics = save_and_evaluate(step)
            elif asked_to_stop or experiment.saves_after(step):
                with progress.aside():
                    watchdog.extend()
                    check_finite(losses, experiment, checkpointer)
                    checkpointer.save(state)
            if asked_to_stop and step < experiment.total_steps:
                leave(step)
    return eval_metrics


def create_train_state(experiment: TrainSetup, optimizer) -> TrainState:
    """The state before the first step, replicated over the devices.

    It is made on the CPU, whatever the devices: there so many small programs compile fastest, and
    the same seed gives the same weights.
    """
    config = experiment.config
    around = functools.partial(first_state, config, optimizer)
    with jax.default_device(sharding.host_device()):
        if config.init_from:
            _, variables = load(
                config.init_from,
                num_classes=experiment.model.num_classes,
                kind=config.init_kind or None,
                model=config.model.name,
            )
            state = _compiled_quickly(around)(variables)
        else:
            init = experiment.model.init
            state = _compiled_quickly(lambda *a: around(init(*a)))(*init_arguments(experiment))
    return sharding.replicate(experiment.mesh, state)


def _compiled_quickly(function):
    """``jax.jit`` for what runs once: optimising takes longer than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def abstract_train_state(experiment: TrainSetup, optimizer) -> TrainState:
    """The state's shapes, dtypes and shardings, as ``jax.ShapeDtypeStruct``s; computes nothing."""
    variables = jax.eval_shape(experiment.model.init, *init_arguments(experiment))
    around = functools.partial(first_state, experiment.config, optimizer)
    return sharding.replicated_shapes(experiment.mesh, jax.eval_shape(around, variables))


def init_arguments(experiment: TrainSetup) -> tuple[jax.Array, jax.Array]:
    """Key and images for ``model.init``."""
    key, _ = jax.random.split(jax.random.key(experiment.config.seed))
    side = experiment.config.data.image_size
    return key, jnp.zeros((1, side, side, 3))


def first_state(config: ml_collections.ConfigDict, optimizer, variables: dict) -> TrainState:
    """The state around the weights that a run starts with."""
    _, run_key = jax.random.split(jax.random.key(config.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema=jax.tree.map(jnp.copy, variables) if "ema" in weight_kinds(config) else None,
        opt_state=optimizer.init(variables["params"]),
        key=jax.random.key_data(run_key),
    )


def make_step(experiment: TrainSetup, optimizer):
    """The training step (state, batch) -> (state, metrics) that the configuration describes."""
    config = experiment.config
    mix = functools.partial(mix_batch, num_classes=experiment.model.num_classes, **config.mixing)
    return make_train_step(
        experiment.model,
        optimizer,
        lambda key, batch: mix(key, batch["image"], batch["label"]),
        mesh=experiment.mesh,
        mean=config.data.mean,
        std=config.data.std,
        ema_step_size=ema_step_size_schedule(config.ema),
        accumulate_steps=config.accumulate_steps,
    )


def named_weights(state: TrainState) -> dict[str, dict]:
    """Raw weights and, where there are any, EMA."""
    raw = {"params": state.params, "batch_stats": state.batch_stats}
    return {"raw": raw} if state.ema is None else {"raw": raw, "ema": state.ema}


def check_finite(losses: dict, experiment: TrainSetup, checkpointer: Checkpointer) -> None:
    """Empties ``losses``, {steps done before: loss}; raises at the first that is not finite."""
    for step, loss in jax.device_get(losses).items():
        if not np.isfinite(loss):
            good = checkpointer.latest_step()
            raise DivergedError(
                f"the loss of step {step + 1} is {loss} at learning rate "
                f"{experiment.learning_rate(step):.4g}. "
                + ("No checkpoint was saved yet" if good is None else f"Checkpoint {good} is good")
                + f" in {checkpointer.directory}. Try a lower --config.schedule.peak or "
                "--config.optimizer.clip_norm=1."
            )
    losses.clear()
