"""Which parameters a run trains, and by which factors of the learning rate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from cotnet_jax.config import raise_problems
from cotnet_jax.models import parameter_names


@dataclasses.dataclass(frozen=True)
class ParameterGroups:
    """What is trained in a phase of a run.

    Attributes:
      frozen: names of the parameters that stay as they are.
      frozen_batch_norms: paths of the batch norms that have no trained parameter; they use and keep
        their running statistics.
      rate_multipliers: {name: factor of the learning rate} of all parameters; {} where all are 1.
    """

    frozen: frozenset[str] = frozenset()
    frozen_batch_norms: frozenset[str] = frozenset()
    rate_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def find_groups(
    finetune: ml_collections.ConfigDict, variables: Callable[[], Mapping[str, Any]]
) -> ParameterGroups:
    """Resolve the patterns of a configuration.

    Args:
      finetune: the section ``finetune``.
      variables: returns {"params", "batch_stats"}, arrays or their shapes; called where needed.

    Raises:
      ValueError: lists all patterns that fit nothing; or nothing would be trained.
    """
    multipliers = parameter_names.parse_multipliers(finetune.rate_multipliers)
    if not (finetune.freeze or multipliers or finetune.layer_decay != 1):
        return ParameterGroups()
    names = list(parameter_names.flatten(variables()["params"]))
    patterns = [("freeze", finetune.freeze)] if finetune.freeze else []
    patterns += [("rate_multipliers", pattern) for pattern in multipliers]
    problems = [
        f"--config.finetune.{field}: {problem}"
        for field, pattern in patterns
        for problem in parameter_names.find_unmatched(pattern, names)
    ]
    frozen = {
        name for name in names if finetune.freeze and parameter_names.fits(finetune.freeze, name)
    }
    if len(frozen) == len(names):
        problems.append(
            f"--config.finetune.freeze={finetune.freeze}: freezes all {len(names)} parameters; "
            "leave some to train, such as the head"
        )
    raise_problems(problems)
    return _freeze(frozen, variables(), _rate_multipliers(names, multipliers, finetune.layer_decay))


def only_head(groups: ParameterGroups, variables: Mapping[str, Any]) -> ParameterGroups:
    """Return the groups of the phase in which the head alone is trained.

    Raises:
      ValueError: there would be nothing to train.
    """
    names = parameter_names.flatten(variables["params"])
    head = {name for name in names if parameter_names.fits(parameter_names.HEAD, name)}
    if head <= groups.frozen:
        raise ValueError(
            "--config.finetune.freeze: freezes the head, which is to be trained first "
            "(--config.finetune.head_only_epochs or head_only_steps)"
        )
    return _freeze(set(names) - head | groups.frozen, variables, groups.rate_multipliers)


def describe(groups: ParameterGroups, variables: Mapping[str, Any]) -> str:
    """Return how much of a network is trained, as one line."""
    sizes = {n: leaf.size for n, leaf in parameter_names.flatten(variables["params"]).items()}
    trained = {name: size for name, size in sizes.items() if name not in groups.frozen}
    layers = list(dict.fromkeys(name.split("/")[0] for name in trained))
    shown = ", ".join(layers if len(layers) < 5 else [*layers[:2], "...", layers[-1]])
    return (
        f"{sum(trained.values()):,} of {sum(sizes.values()):,} parameters, in {len(trained)} of "
        f"{len(sizes)} arrays ({shown})"
    )


def _freeze(frozen, variables, multipliers) -> ParameterGroups:
    batch_norms = {
        name.rpartition("/")[0] for name in parameter_names.flatten(variables["batch_stats"])
    }
    trained = {
        name.rpartition("/")[0]
        for name in parameter_names.flatten(variables["params"])
        if name not in frozen
    }
    return ParameterGroups(
        frozen=frozenset(frozen),
        frozen_batch_norms=frozenset(batch_norms - trained),
        rate_multipliers=multipliers,
    )


def _rate_multipliers(names, multipliers, layer_decay) -> dict[str, float]:
    if not multipliers and layer_decay == 1:
        return {}
    depths = parameter_names.depths(names) if layer_decay != 1 else dict.fromkeys(names, 0)

    def of_pattern(name):
        return next((f for p, f in multipliers.items() if parameter_names.fits(p, name)), 1.0)

    return {name: of_pattern(name) * layer_decay ** depths[name] for name in names}
