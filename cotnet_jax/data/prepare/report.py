"""The report of a prepared dataset: as a file beside the data, and printed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotnet_jax import command_line
from cotnet_jax.data.prepare.plan import Plan
from cotnet_jax.data.prepare.shards import Shard, ShardResult

FILE_NAME = "prepare_report.json"
_MAX_PRINTED = 10


def make_report(
    plan: Plan, results: Mapping[Shard, ShardResult], source: Path, differences: Sequence[str]
) -> dict[str, Any]:
    """Return the report, ready for JSON.

    Returns:
      {"dataset": "NAME/VERSION", "source", "classes": their number, "splits", "differences"}.
      Each split has {"images", "bytes", "shards": numbers, "reencoded": file names,
      "undecodable": [index, file name, reason] each}.
    """
    splits: dict[str, dict[str, Any]] = {}
    for shard, result in results.items():
        split = splits.setdefault(
            shard.split,
            {"images": 0, "bytes": 0, "shards": 0, "reencoded": [], "undecodable": []},
        )
        split["images"] += shard.length
        split["bytes"] += result.num_bytes
        split["shards"] += 1
        split["reencoded"] = sorted([*split["reencoded"], *result.reencoded])
        split["undecodable"] += [list(entry) for entry in result.undecodable]
    return {
        "dataset": f"{plan.name}/{plan.version}",
        "source": str(source),
        "classes": plan.features["label"].num_classes,
        "splits": splits,
        "differences": list(differences),
    }


def print_report(report: Mapping[str, Any], output: Path, imagenet_dir: Path | None) -> None:
    """Print the report and the command that trains on the dataset.

    Args:
      report: from ``make_report``.
      output: the dataset's folder.
      imagenet_dir: the folder in which TFDS finds the dataset by ImageNet's name; None if the
        dataset is not ImageNet and is found by its folder.
    """
    print(f"\n{report['dataset']}, {report['classes']} classes, in {output}")
    for name, split in report["splits"].items():
        undecodable = split["undecodable"]
        print(
            f"  {name}: {split['images']:,} images, {split['bytes'] / 1e9:.2f} GB in "
            f"{split['shards']} files; {len(split['reencoded'])} converted to RGB JPEG, "
            f"{len(undecodable)} undecodable"
        )
        for index, file_name, reason in undecodable[:_MAX_PRINTED]:
            print(f"    {name}[{index}] {file_name}: {reason}")
        if len(undecodable) > _MAX_PRINTED:
            print(f"    and {len(undecodable) - _MAX_PRINTED} more")
    for difference in report["differences"]:
        print(f"  DIFFERS: {difference}")
    print(f"The whole report is in {output / FILE_NAME}")
    if imagenet_dir:
        flags = [f"--config.data.data_dir={imagenet_dir}"]
    else:
        flags = [f"--config.data.name={output}", *_split_flags(list(report["splits"]))]
    print(
        "Train on it:\n"
        f"  {command_line.command('train')} --config=cotnet50 --workdir=DIR {' '.join(flags)}"
    )


def _split_flags(splits: Sequence[str]) -> list[str]:
    """Return the flags that choose the splits for training and evaluation."""
    if {"train", "validation"} <= set(splits):
        return []
    if len(splits) == 1:
        train, evaluation = f"'{splits[0]}[:90%]'", f"'{splits[0]}[90%:]'"
    else:
        train = evaluation = "SPLIT"
    return [f"--config.data.train_split={train}", f"--config.data.eval_split={evaluation}"]
