"""What a configuration resolves to: devices, data, network, evaluators, learning rates."""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cotnet_jax.config import (
    expand_paths,
    find_length_problems,
    find_problems,
    raise_problems,
)
from cotnet_jax.data import pipeline
from cotnet_jax.data.examples import file_name_of
from cotnet_jax.data.labels import balanced_weights, read_labels
from cotnet_jax.data.sources import Source, Synthetic, open_source
from cotnet_jax.data.undecodable import Batch
from cotnet_jax.distributed import sharding
from cotnet_jax.models.cotnet import create_model
from cotnet_jax.training import predictions
from cotnet_jax.training.evaluators import Evaluator, make_evaluators
from cotnet_jax.training.optimizer import learning_rates
from cotnet_jax.training.parameter_groups import ParameterGroups, find_groups, only_head


@dataclasses.dataclass(frozen=True)
class EvalSetup:
    """What an evaluation needs.

    Attributes:
      config: the whole configuration, checked.
      mesh: all devices of all processes.
      model: the network, with the dataset's number of classes.
      eval_source: the evaluation split.
      evaluators: what is measured.
      report: whether the predictions of every image are kept, too.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: nn.Module
    eval_source: Source
    evaluators: tuple[Evaluator, ...]
    report: bool = False

    @property
    def steps_per_pass(self) -> int:
        """Batches in one pass over the evaluation split."""
        return pipeline.steps_per_pass(self.config, self.eval_source)

    def eval_batches(self) -> Generator[Batch, None, None]:
        """Return this process's rows of the evaluation batches, pass after pass without end."""
        fields = {
            name: field
            for evaluator in self.evaluators
            for name, field in evaluator.example_fields.items()
        }
        if self.report:
            fields[predictions.FILE_NAME] = file_name_of
        return pipeline.eval_batches(
            self.config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=self.eval_source,
            example_fields=fields,
            repeat=True,
        )


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What training needs.

    Attributes:
      eval: what its evaluations need; training shares its configuration, mesh and network.
      train_source: the training split.
      steps_per_epoch: full batches of it.
      learning_rates: float64, the learning rate of every epoch or step, as in config.schedule.unit.
    """

    eval: EvalSetup
    train_source: Source
    steps_per_epoch: int
    learning_rates: np.ndarray

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.eval.config

    @property
    def mesh(self) -> Mesh:
        return self.eval.mesh

    @property
    def model(self) -> nn.Module:
        return self.eval.model

    @property
    def class_names(self) -> Sequence[str] | None:
        """The dataset's classes, in the order of its labels; None for noise, which has none."""
        source = self.train_source
        return None if isinstance(source, Synthetic) else source.class_names

    @property
    def total_steps(self) -> int:
        return _total_steps(self.config, self.steps_per_epoch)

    @property
    def steps_per_rate(self) -> int:
        """Steps with the same learning rate."""
        return 1 if self.config.schedule.unit == "step" else self.steps_per_epoch

    @property
    def head_only_steps(self) -> int:
        """Steps at the beginning in which only the head is trained."""
        finetune = self.config.finetune
        return finetune.head_only_steps or finetune.head_only_epochs * self.steps_per_epoch

    @property
    def steps_per_eval(self) -> int:
        """Steps from one evaluation to the next; the last step is always evaluated, too."""
        return self.config.steps_per_eval or self.config.eval.every_epochs * self.steps_per_epoch

    def evaluates_after(self, step: int) -> bool:
        """Return whether the weights after ``step`` steps are evaluated, and saved with metrics."""
        return step == self.total_steps or step % self.steps_per_eval == 0

    def saves_after(self, step: int) -> bool:
        """Return whether the state after ``step`` steps is saved, evaluated or not."""
        # Runs that are evaluated by steps may have epochs of seconds, too short for a checkpoint.
        epoch_ends = not self.config.steps_per_eval and step % self.steps_per_epoch == 0
        interval = self.config.checkpoint.every_steps
        return self.evaluates_after(step) or epoch_ends or bool(interval and step % interval == 0)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones."""
        return float(self.learning_rates[step // self.steps_per_rate])

    @property
    def init_arguments(self) -> tuple[jax.Array, jax.Array]:
        """The key and the images for ``model.init``."""
        init_key, _ = jax.random.split(jax.random.key(self.config.seed))
        size = self.config.data.image_size
        return init_key, jnp.zeros((1, size, size, 3))

    @functools.cached_property
    def variable_shapes(self) -> dict[str, Any]:
        """{"params", "batch_stats"}, each leaf a ``jax.ShapeDtypeStruct``."""
        return jax.eval_shape(self.model.init, *self.init_arguments)

    @functools.cached_property
    def groups(self) -> ParameterGroups:
        """What is trained, but for the phase in which only the head is."""
        return find_groups(self.config.finetune, lambda: self.variable_shapes)

    @functools.cached_property
    def head_groups(self) -> ParameterGroups:
        """What is trained in the first ``head_only_steps`` steps."""
        return only_head(self.groups, self.variable_shapes)

    @functools.cached_property
    def class_weights(self) -> np.ndarray | None:
        """Weights of the classes in the loss, float32 [classes]; None where they are all alike."""
        if not self.config.loss.class_weights:
            return None
        labels = read_labels(self.train_source, self.config.data.train_split)
        return balanced_weights(labels, self.train_source.num_classes)

    def train_batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Return this process's rows of the training batches from a step on, without end."""
        return pipeline.train_batches(
            self.config,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=self.train_source,
        )


def set_up_training(config: ml_collections.ConfigDict, devices=None) -> TrainSetup:
    """Check a configuration and open what it names.

    Args:
      config: as in configs/default.py.
      devices: the devices to use, by default all of all processes.

    Raises:
      ValueError: lists every field that cannot be used; or a split cannot be opened.
    """
    evaluation = set_up_evaluation(config, devices, training=True)
    config = evaluation.config
    train_source = open_source(config.data, config.data.train_split)
    if train_source.num_classes < 2:
        raise ValueError(
            f"config.data.name = {config.data.name!r} has one class, "
            f"{train_source.class_names[0]!r}, and a classifier needs two"
        )
    steps_per_epoch = pipeline.steps_per_epoch(config, train_source)
    raise_problems(find_length_problems(config, steps_per_epoch))
    setup = TrainSetup(
        eval=evaluation,
        train_source=train_source,
        steps_per_epoch=steps_per_epoch,
        learning_rates=_learning_rates(config, steps_per_epoch),
    )
    # Their patterns are checked before anything is read.
    _ = setup.head_groups if setup.head_only_steps else setup.groups
    return setup


def set_up_evaluation(
    config: ml_collections.ConfigDict,
    devices=None,
    *,
    training: bool = False,
    report: bool = False,
) -> EvalSetup:
    """Check a configuration and open its evaluation split; the training split may be missing.

    Args:
      config: as in configs/default.py.
      devices: the devices to use, by default all of all processes.
      training: True also checks what only a training step needs.
      report: measure what a report shows, and keep the predictions of every image.

    Raises:
      ValueError: lists every field that cannot be used; or the split cannot be opened, or an
        evaluator cannot score it.
    """
    config = expand_paths(config)
    mesh = sharding.make_mesh(devices)
    problems = find_problems(config, mesh.size, training=training)
    evaluators, unusable = make_evaluators(config, report=report)
    problems += unusable
    raise_problems(problems)
    eval_source = open_source(config.data, config.data.eval_split)
    for evaluator in evaluators:
        evaluator.check_source(config, eval_source)
    return EvalSetup(
        config=config,
        mesh=mesh,
        model=_model(config, eval_source.num_classes),
        eval_source=eval_source,
        evaluators=evaluators,
        report=report,
    )


def _total_steps(config, steps_per_epoch) -> int:
    return config.steps or config.epochs * steps_per_epoch


def _learning_rates(config, steps_per_epoch) -> np.ndarray:
    schedule = config.schedule
    in_epochs = schedule.unit == "epoch"
    steps = _total_steps(config, steps_per_epoch)
    warmup_steps = schedule.warmup_steps or schedule.warmup_epochs * steps_per_epoch
    return learning_rates(
        schedule,
        -(-steps // steps_per_epoch) if in_epochs else steps,
        config.batch_size,
        warmup=schedule.warmup_epochs if in_epochs else warmup_steps,
    )


def _model(config, num_classes):
    return create_model(
        config.model.name,
        num_classes=num_classes,
        dtype=_dtype(config.model.dtype),
        drop_rate=config.model.drop_rate,
        drop_path_rate=config.model.drop_path_rate,
        output_stride=config.model.output_stride,
        bn_axis_name=sharding.DATA_AXIS if config.model.sync_batch_norm else None,
        freeze_batch_norm=config.model.freeze_batch_norm,
    )


def _dtype(name):
    """Resolve "auto": bfloat16 where there are matrix units for it, float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
