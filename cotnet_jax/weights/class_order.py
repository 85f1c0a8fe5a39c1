"""Weights and datasets agree on classes by their names, not by their numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from cotnet_jax.data import class_names
from cotnet_jax.data.file_names import as_text
from cotnet_jax.weights.folder import WeightsError

_MAX_NAMED = 3


def match_classes(
    variables: Mapping[str, dict],
    names: Sequence[str] | None,
    dataset_names: Sequence[str],
    *,
    weights: str,
    accept: bool = False,
) -> dict[str, dict]:
    """Return variables whose logits are in the order of a dataset's classes.

    Args:
      variables: {"params", "batch_stats"}; the classifier is params["head"].
      names: the classes that the logits are for; None if that is unknown, which agrees with all.
      dataset_names: the classes of the dataset.
      weights: what to call the weights in messages.
      accept: use the logits in the order that they have, whatever the names are.

    Returns:
      The variables, or those with the logits permuted where the same names have another order.

    Raises:
      WeightsError: the names differ.
    """
    variables = dict(variables)
    if names is None:
        return variables
    known, wanted = _comparable(names), _comparable(dataset_names)
    if known == wanted:
        return variables
    if accept:
        logging.warning("%s: names of classes differ from the dataset's, as accepted.", weights)
        return variables
    if Counter(known) != Counter(wanted) or len(set(known)) < len(known):
        raise WeightsError(_difference(weights, known, wanted))
    position = {name: index for index, name in enumerate(known)}
    order = np.array([position[name] for name in wanted])
    logging.info(
        "%s: the same %d classes in another order than the dataset's; its logits are put into "
        "the dataset's order.",
        weights,
        len(order),
    )
    head = {
        name: np.asarray(leaf)[..., order] for name, leaf in variables["params"]["head"].items()
    }
    return {**variables, "params": {**variables["params"], "head": head}}


def _comparable(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as classes.txt and TFDS keep them; ImageNet's words become WordNet ids."""
    names = tuple(as_text(name).strip() for name in names)
    return class_names.imagenet_wnids() if names == class_names.imagenet_names() else names


def _difference(weights: str, known: Sequence[str], wanted: Sequence[str]) -> str:
    only = (
        (f"{whose} {_some(sorted(set(some) - set(others)))}")
        for whose, some, others in (
            ("only the weights have", known, wanted),
            ("only the dataset has", wanted, known),
        )
        if set(some) - set(others)
    )
    details = "; ".join(only) or "a name is there several times"
    return (
        f"{weights}: these weights are for other classes than the dataset's: {details}. Use the "
        "dataset that they were trained on, or --config.accept_classes=True to use the "
        f"{len(known)} logits in the order they have"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + more
