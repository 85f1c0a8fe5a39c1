"""The training loop: from a configuration and a workdir to trained weights."""

from pathlib import Path

import jax
import ml_collections
import optax
from absl import logging

from cotnet_jax.checkpoint.checkpointer import has_steps
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.data import randaugment
from cotnet_jax.training import parameter_groups
from cotnet_jax.training.compiling import compile_ahead, with_kernels_side_by_side
from cotnet_jax.training.extras import gradient_norms, wanted
from cotnet_jax.training.mixup import mix_batch
from cotnet_jax.training.optimizer import ema_step_size_schedule, make_optimizer
from cotnet_jax.training.randaugment.batch import randaugment_batch
from cotnet_jax.training.setup import TrainSetup, set_up_training
from cotnet_jax.training.state import abstract_batch, abstract_train_state, create_train_state
from cotnet_jax.training.step import make_train_step
from cotnet_jax.training.summary import start_summary
from cotnet_jax.training.trackers import import_trackers
from cotnet_jax.training.trainer import Trainer


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Train to the end of the run, resuming an earlier run in workdir where it stopped.

    Args:
      config: as in configs/default.py.
      workdir: the run's folder; ``Workdir`` lists its files.

    Returns:
      The metrics of the last evaluation, as ``EvalLoop.run`` returns them, for "raw" weights and,
      where there is one, the EMA "ema".

    Raises:
      ValueError: the configuration or the dataset cannot be used.
      WorkdirError: the workdir holds another run, or one with settings that must not change.
      LockedError: another run is at work in the workdir.
      DivergedError: a loss, new weights or predictions were not finite; the message says where,
        and which checkpoint is good.
      CheckpointError, OSError: something could not be written; earlier checkpoints are intact.
      PreemptedError: SIGTERM came after the first step of this process; that step is saved.
    """
    workdir = Workdir(workdir)
    setup = set_up_training(config)
    import_trackers(setup.config.log.writers)
    with workdir.locked():
        return _train(setup, workdir)


def _train(setup: TrainSetup, workdir: Workdir) -> dict[str, float]:
    """Do what ``train`` does, in a workdir that this run has for itself."""
    optimizer = build_optimizer(setup)
    # A run that resumes takes its weights from a checkpoint; until then their shapes will do.
    resumes = has_steps(workdir.checkpoints)
    workdir.check_resume(
        setup.config,
        has_steps=resumes,
        class_names=setup.class_names,
        images=len(setup.train_source),
    )
    # The first steps may train only the head, which is another program.
    first_step = build_train_step(setup, optimizer, head_only=setup.head_only_steps > 0)
    state = abstract_train_state(setup, optimizer)
    if resumes:
        first_step = with_kernels_side_by_side(first_step)
    else:
        first_step = compile_ahead(first_step, state, abstract_batch(setup))
        state = create_train_state(setup, optimizer)
    train_step = first_step
    if setup.head_only_steps:
        train_step = with_kernels_side_by_side(build_train_step(setup, optimizer))
    logging.info("This run:\n%s", start_summary(setup, state.params, workdir))
    _log_what_is_trained(setup)

    with Trainer(setup, workdir) as trainer:
        state = trainer.restore(state)
        # Only now does the run fit: a start that is refused leaves the run's files as they were.
        workdir.write_run_metadata(
            config=setup.config,
            params=state.params,
            mesh=setup.mesh,
            class_names=setup.train_source.class_names,
            images=len(setup.train_source),
        )
        eval_metrics = {}
        if trainer.missed_evaluation():
            logging.info("Evaluating step %d, which was saved but not evaluated.", trainer.step)
            eval_metrics = trainer.save_and_evaluate(state)
        if finished := trainer.why_finished():
            logging.info("This run is finished: %s. Evaluating its last weights.", finished)
            return eval_metrics or trainer.evaluate(state)

        for batch in trainer.batches():
            step = first_step if trainer.step < setup.head_only_steps else train_step
            with trainer.profiled_step():
                state, metrics = step(state, batch)
            trainer.finish_step(metrics)
            workdir.check_lock()
            stopping = trainer.should_stop()
            if setup.evaluates_after(trainer.step):
                eval_metrics = trainer.save_and_evaluate(state)
            elif stopping or setup.saves_after(trainer.step):
                trainer.save(state)
            if stopping and not trainer.why_finished():
                trainer.stop()
    return eval_metrics


def build_optimizer(setup: TrainSetup) -> optax.GradientTransformation:
    """Return the optimizer that a configuration describes, for the parameters that are trained."""
    return make_optimizer(
        setup.config.optimizer,
        setup.learning_rates,
        setup.steps_per_rate,
        rate_multipliers=setup.groups.rate_multipliers,
        head_first=setup.head_only_steps > 0,
    )


def build_train_step(
    setup: TrainSetup, optimizer: optax.GradientTransformation, *, head_only: bool = False
) -> jax.stages.Wrapped:
    """Return the train step that a configuration describes.

    Args:
      optimizer: from ``build_optimizer``.
      head_only: the step of the phase in which only the head is trained.
    """
    config = setup.config
    groups = setup.head_groups if head_only else setup.groups
    model = setup.model
    if groups.frozen and not model.freeze_batch_norm:
        model = model.clone(freeze_batch_norm=groups.frozen_batch_norms)
    class_weights = setup.class_weights

    on_device = config.augment.randaugment_on == "device"
    augment = randaugment.parse(config.augment.randaugment) if on_device else None

    def mix(key: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
        images = batch["image"]
        if augment:
            key, augment_key = jax.random.split(key)
            images = randaugment_batch(augment_key, images, augment)
        images, targets = mix_batch(
            key,
            images,
            batch["label"],
            num_classes=model.num_classes,
            **config.mixing,
        )
        # The loss is linear in the targets.
        return images, targets if class_weights is None else targets * class_weights

    return make_train_step(
        model,
        optimizer,
        mix,
        mesh=setup.mesh,
        mean=config.data.mean,
        std=config.data.std,
        ema_step_size=ema_step_size_schedule(config.ema),
        accumulate_steps=config.accumulate_steps,
        frozen=groups.frozen,
        extra_metrics=gradient_norms if wanted(config.log.extras, "gradient_norms") else None,
    )


def _log_what_is_trained(setup: TrainSetup) -> None:
    def log(what: str, groups: parameter_groups.ParameterGroups) -> None:
        logging.info("%s: %s.", what, parameter_groups.describe(groups, setup.variable_shapes))

    if setup.head_only_steps:
        log(f"Trained up to step {setup.head_only_steps}", setup.head_groups)
    if setup.head_only_steps or setup.groups.frozen:
        log("Trained", setup.groups)
