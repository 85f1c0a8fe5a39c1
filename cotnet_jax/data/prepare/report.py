"""The report of a prepared dataset: as a file beside the data, and printed."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotnet_jax import command_line
from cotnet_jax.data.prepare.plan import Plan
from cotnet_jax.data.prepare.shards import Shard, ShardResult

FILE_NAME = "prepare_report.json"
_MAX_PRINTED = 10
_MAX_CLASSES = 5


def make_report(
    plan: Plan,
    results: Mapping[Shard, ShardResult],
    source: Path,
    differences: Sequence[str],
    *,
    begun: float,
) -> dict[str, Any]:
    """Return the report, ready for JSON.

    Args:
      begun: when the source was listed, in seconds since 1970.

    Returns:
      {"dataset": "NAME/VERSION", "source", "begun", "fingerprint", "short_side": of the plan,
      "classes": their number, "splits", "differences"}. Each split has {"images", "bytes",
      "shards", "resized": numbers, "images_of_class": {class: number}, empty where unknown,
      "reencoded": file names,
      "undecodable": [index, file name, reason] each, "left_out": [file name, reason] each}.
    """
    class_names = plan.features["label"].names
    splits: dict[str, dict[str, Any]] = {}
    for shard, result in results.items():
        split = splits.setdefault(
            shard.split,
            {
                "images": 0,
                "bytes": 0,
                "shards": 0,
                "resized": 0,
                "images_of_class": Counter(),
                "reencoded": [],
                "undecodable": [],
                "left_out": [],
            },
        )
        left_out = {name for name, _ in result.left_out}
        split["images"] += shard.length - len(left_out)
        split["bytes"] += result.num_bytes
        split["shards"] += 1
        split["resized"] += result.resized
        split["images_of_class"].update(
            class_names[image.label] for image in shard.images if image.name not in left_out
        )
        split["reencoded"] = sorted([*split["reencoded"], *result.reencoded])
        split["undecodable"] += [list(entry) for entry in result.undecodable]
        split["left_out"] += [list(entry) for entry in result.left_out]
    return {
        "dataset": f"{plan.name}/{plan.version}",
        "source": str(source),
        "begun": begun,
        "fingerprint": plan.fingerprint,
        "short_side": plan.short_side,
        "classes": len(class_names),
        "splits": splits,
        "differences": [*differences, *_absent_classes(splits, class_names)],
    }


def describe_size(short_side: int) -> str:
    """Return a sentence about the size of a dataset's images, as ``Plan.short_side``."""
    if short_side:
        return f"Images are resized to a short side of {short_side} pixels, or smaller."
    return "Images have their own sizes."


def print_report(report: Mapping[str, Any], output: Path, imagenet_dir: Path | None) -> None:
    """Print the report and a command that trains on the dataset.

    Args:
      report: from ``make_report``.
      output: the dataset's folder.
      imagenet_dir: the folder in which TFDS finds the dataset by ImageNet's name; None if the
        dataset is not ImageNet and is found by its folder.
    """
    splits = report["splits"].values()
    classes = sorted({name for split in splits for name in split["images_of_class"]})
    more = ", ..." if len(classes) > _MAX_CLASSES else ""
    names = f" ({', '.join(classes[:_MAX_CLASSES])}{more})" if classes else ""
    print(f"\n{report['dataset']}, {report['classes']} classes{names}, in {output}")
    for name, split in report["splits"].items():
        print(f"  {name}: {_split_text(split)}")
        for index, file_name, reason in split["undecodable"][:_MAX_PRINTED]:
            print(f"    undecodable: {name}[{index}] {file_name}: {reason}")
        for file_name, reason in split["left_out"][:_MAX_PRINTED]:
            print(f"    left out, undecodable: {file_name}: {reason}")
        left = max(0, len(split["undecodable"]) + len(split["left_out"]) - _MAX_PRINTED)
        if left:
            print(f"    and {left} more")
    for difference in report["differences"]:
        print(f"  DIFFERS: {difference}")
    print(f"The whole report is in {output / FILE_NAME}")
    if imagenet_dir:
        print("Train on it:")
        data_dir = f"--config.data.data_dir={imagenet_dir}"
        _print_command("cotnet50", data_dir, "--workdir=runs/imagenet")
        return
    name = report["dataset"].split("/")[0]
    dataset = [f"--config.data.name={output}", *_split_options(list(report["splits"]))]
    print("Fine-tune weights on it, here converted ones (docs/finetuning.md):")
    _print_command("finetune", "--weights=weights/cotnet50", *dataset, f"--workdir=runs/{name}")


def _split_text(split: Mapping[str, Any]) -> str:
    of_class = sorted(split["images_of_class"].values())
    of_class = f", {of_class[0]:,} to {of_class[-1]:,} of a class" if of_class else ""
    size, unit = next(
        (split["bytes"] / size, unit)
        for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        if split["bytes"] >= size or unit == "kB"
    )
    resized = f"{split['resized']:,} resized, " if split["resized"] else ""
    return (
        f"{split['images']:,} images{of_class}, {size:,.1f} {unit} in {split['shards']} files; "
        f"{resized}{len(split['reencoded'])} converted to RGB JPEG, "
        f"{len(split['undecodable']) + len(split['left_out'])} undecodable"
    )


def _absent_classes(splits: Mapping[str, Any], class_names: Sequence[str]) -> Iterator[str]:
    for name, split in splits.items():
        absent = [each for each in class_names if each not in split["images_of_class"]]
        if absent and split["images_of_class"]:
            first = ", ".join(absent[:_MAX_CLASSES])
            yield f"{name}: no images of {len(absent)} classes, the first {first}"


def _print_command(config: str, *options: str) -> None:
    print(f"  {command_line.command('train')} {shlex.join([f'--config={config}', *options])}")


def _split_options(splits: Sequence[str]) -> list[str]:
    """Return the options that choose the splits for training and evaluation."""
    if {"train", "validation"} <= set(splits):
        return []
    if len(splits) == 1:
        train, evaluation = f"{splits[0]}[:90%]", f"{splits[0]}[90%:]"
    else:
        train = "train" if "train" in splits else splits[0]
        others = [split for split in splits if split != train]
        evaluation = next((s for s in ("validation", "test") if s in others), others[0])
    return [f"--config.data.train_split={train}", f"--config.data.eval_split={evaluation}"]
