"""Weights and datasets agree on classes by their names, not by their numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from cotnet_jax.data.class_names import comparable, describe_difference
from cotnet_jax.weights.folder import WeightsError


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
    known, wanted = comparable(names), comparable(dataset_names)
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


def _difference(weights: str, known: Sequence[str], wanted: Sequence[str]) -> str:
    details = describe_difference(
        known, wanted, only_first="only the weights have", only_second="only the dataset has"
    )
    details = details or "a name is there several times"
    return (
        f"{weights}: these weights are for other classes than the dataset's: {details}. Use the "
        "dataset that they were trained on, --config.finetune.new_head=True to train a new "
        "classifier, or --config.accept_classes=True to use the "
        f"{len(known)} logits in the order they have"
    )
