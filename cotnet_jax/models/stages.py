"""The stem, the stages and the head of a network, by the names of its parameters."""

from collections.abc import Mapping
from typing import Any


def stage_of(name: str) -> str:
    """Return "stage3" for "stage3_block5"; other modules, such as "stem", are their own."""
    return name.partition("_")[0]


def split_by_stage(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split the parameters of a network, or what has their structure, into its stages.

    Args:
      tree: {module: arrays}, as in the collection "params".

    Returns:
      {"stem", "stage1", ..., "head": the part of the tree}, the head last.
    """
    stages: dict[str, dict[str, Any]] = {}
    for name in tree:
        stages.setdefault(stage_of(name), {})[name] = tree[name]
    # "stem" would come after "stage1".
    order = sorted(stages, key=lambda stage: (stage == "head", stage != "stem", stage))
    return {stage: stages[stage] for stage in order}
