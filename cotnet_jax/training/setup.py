"""What a configuration resolves to: devices, data, network, schedule."""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cotnet_jax.config import find_problems
from cotnet_jax.data import imagenet, pipeline
from cotnet_jax.data.real_labels import read_real_labels, with_real_labels
from cotnet_jax.data.sources import Source, open_source
from cotnet_jax.distributed import sharding
from cotnet_jax.models.cotnet import create_model
from cotnet_jax.training.optimizer import learning_rates


@dataclasses.dataclass(frozen=True)
class EvalSetup:
    """What evaluating needs.

    Attributes:
      config: all fields as given.
      mesh: all devices of all processes.
      model: the network, with the dataset's number of classes.
      eval_source: the evaluation split.
      real_labels: of ``read_real_labels``, where they are asked for.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    model: nn.Module
    eval_source: Source
    real_labels: np.ndarray | None

    @property
    def steps_per_pass(self) -> int:
        """Batches in one pass over the evaluation split."""
        return pipeline.steps_per_pass(self.config, self.eval_source)

    def eval_batches(self) -> Iterator[dict]:
        """This process's rows of one pass after the other over the evaluation split."""
        with_numbers = self.real_labels is not None
        batches = pipeline.eval_batches(
            self.config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=self.eval_source,
            numbers=with_numbers,
            repeat=True,
        )
        return with_real_labels(batches, self.real_labels) if with_numbers else batches


@dataclasses.dataclass(frozen=True)
class TrainSetup(EvalSetup):
    """What training needs besides.

    Attributes:
      train_source: the training split.
      steps_per_epoch: full batches of it.
      rates: float64 [epochs], the learning rate of every epoch.
    """

    train_source: Source
    steps_per_epoch: int
    rates: np.ndarray

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def steps_per_eval(self) -> int:
        """Steps from one evaluation to the next; the last step is evaluated besides."""
        return self.config.steps_per_eval or self.config.eval.every_epochs * self.steps_per_epoch

    def evaluates_after(self, step: int) -> bool:
        """Whether the weights after ``step`` steps are evaluated, and saved with their metrics."""
        return step == self.total_steps or step % self.steps_per_eval == 0

    def saves_after(self, step: int) -> bool:
        """Whether the state after ``step`` steps is saved, evaluated or not."""
        # Who evaluates by steps may have epochs of seconds, too short for a checkpoint each.
        epoch_ends = not self.config.steps_per_eval and step % self.steps_per_epoch == 0
        interval = self.config.checkpoint.every_steps
        return self.evaluates_after(step) or epoch_ends or bool(interval and step % interval == 0)

    def learning_rate(self, step: int) -> float:
        """Of the step that follows ``step`` finished ones."""
        return float(self.rates[step // self.steps_per_epoch])

    def train_batches(self, start_step: int) -> Iterator[dict]:
        """This process's rows of the training batches from a step on, without end."""
        return pipeline.train_batches(
            self.config,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=self.train_source,
        )


def set_up_training(config: ml_collections.ConfigDict, devices=None) -> TrainSetup:
    """Checks a configuration and opens what it names; ``devices`` are all, unless given.

    Raises:
      ValueError: lists every field that is out of its range; or the dataset cannot be opened.
    """
    evaluation = set_up_evaluation(config, devices, training=True)
    train_source = open_source(config.data, config.data.train_split)
    return TrainSetup(
        **vars(evaluation),
        train_source=train_source,
        steps_per_epoch=pipeline.steps_per_epoch(config, train_source),
        rates=learning_rates(config.schedule, config.epochs, config.batch_size),
    )


def set_up_evaluation(
    config: ml_collections.ConfigDict, devices=None, *, training: bool = False
) -> EvalSetup:
    """As ``set_up_training``, for evaluating alone: the training split need not be there.

    ``training`` checks what only a training step needs, too.
    """
    mesh = sharding.make_mesh(devices)
    problems = find_problems(config, mesh.size, training=training)
    real_labels = None
    if config.eval.real_labels:
        try:
            real_labels = read_real_labels(config.eval.real_labels)
        except ValueError as error:
            problems.append(f"--config.eval.real_labels={error}")
    if problems:
        raise ValueError("the configuration has problems:\n  " + "\n  ".join(problems))
    eval_source = open_source(config.data, config.data.eval_split)
    if real_labels is not None:
        _check_names(config, eval_source)
    return EvalSetup(
        config=config,
        mesh=mesh,
        model=_model(config, eval_source.num_classes),
        eval_source=eval_source,
        real_labels=real_labels,
    )


def _model(config, num_classes):
    return create_model(
        config.model.name,
        num_classes=num_classes,
        dtype=_dtype(config.model.dtype),
        drop_rate=config.model.drop_rate,
        drop_path_rate=config.model.drop_path_rate,
        output_stride=config.model.output_stride,
        bn_axis_name=sharding.AXIS if config.model.sync_batch_norm else None,
        freeze_batch_norm=config.model.freeze_batch_norm,
    )


def _check_names(config, eval_source):
    """Whether ReaL labels can be of these images."""
    name = eval_source[0]["file_name"]
    if eval_source.num_classes != imagenet.NUM_CLASSES or not imagenet.validation_number(name):
        raise ValueError(
            f"--config.eval.real_labels={config.eval.real_labels}: these are labels of ImageNet's "
            "validation images, which are told by their names, such as "
            f"{imagenet.validation_name(293)}; the "
            f"first of {config.data.name!r} {config.data.eval_split!r} is named {name!r}, one of "
            f"{eval_source.num_classes} classes"
        )


def _dtype(name):
    """ "auto" is bfloat16 where there are matrix units for it, float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
