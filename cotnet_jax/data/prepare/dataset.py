"""Write a planned dataset: shards in parallel, resuming after an interruption, then metadata.

Everything is written to a folder `incomplete_VERSION` beside the final one. Finished shards are
recorded in its progress file and not written again. At the end the folder gets its final name.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from cotnet_jax import files
from cotnet_jax.data.dataset_folder import num_records
from cotnet_jax.data.prepare import report
from cotnet_jax.data.prepare.plan import Plan
from cotnet_jax.data.prepare.shards import Shard, ShardResult, write

_PROGRESS = "progress.jsonl"


class PrepareError(RuntimeError):
    """The dataset cannot be written; the message says why and what to do."""


def write_dataset(plan: Plan, pool: Executor, check: bool) -> dict[Shard, ShardResult]:
    """Write the shards that are missing, with a progress bar over images.

    Args:
      plan: what to write.
      pool: the workers.
      check: as in ``shards.write``.

    Returns:
      The result of every shard, including those that an earlier run wrote.

    Raises:
      PrepareError: an earlier run began to write other images, or the disk is too small.
      OSError: from reading or writing; finished shards are kept.
    """
    folder = plan.incomplete
    folder.mkdir(parents=True, exist_ok=True)
    # Of a process that was killed: another one that lives would hold the lock.
    files.remove_leftovers(folder, "writing_*")
    results = _read_progress(plan, check)
    missing = [shard for shard in plan.shards if shard not in results]
    _check_space(plan, results)
    bar = tqdm(
        desc="writing",
        total=sum(shard.length for shard in plan.shards),
        initial=sum(shard.length for shard in results),
        unit=" images",
    )
    _end_line(folder / _PROGRESS)
    with bar, open(folder / _PROGRESS, "a") as progress:

        def record(future: Future[ShardResult]):
            shard, result = futures.pop(future), future.result()
            line = {"shard": str(shard.path), **dataclasses.asdict(result)}
            progress.write(json.dumps(line) + "\n")
            progress.flush()
            results[shard] = result
            bar.update(shard.length)

        futures = {
            pool.submit(
                write,
                dataclasses.replace(shard, path=folder / shard.path),
                plan.plain_jpeg,
                check,
                plan.leave_out,
                plan.short_side,
            ): shard
            for shard in missing
        }
        try:
            for future in as_completed(list(futures)):
                record(future)
        finally:
            for future in list(futures):
                future.cancel()
                # One that finished while another failed counts, too.
                if future.done() and not future.cancelled() and not future.exception():
                    record(future)
    return {shard: results[shard] for shard in plan.shards}


def finish(
    plan: Plan, results: Mapping[Shard, ShardResult], report_contents: Mapping[str, Any]
) -> None:
    """Count the records on disk, write TFDS's metadata and the report, and rename the folder.

    Raises:
      PrepareError: the number of records in a shard is not the one that was written, or no image of
        a split can be decoded.
    """
    folder = plan.incomplete
    lengths = {shard: shard.length - len(results[shard].left_out) for shard in plan.shards}
    paths = {folder / shard.path: length for shard, length in lengths.items()}
    wrong = [problem for path, length in paths.items() if (problem := _problem(path, length))]
    if wrong:
        raise PrepareError(
            f"in {folder}: " + "; ".join(wrong) + "; delete these files and run the command again"
        )
    by_split: dict[str, list[Shard]] = {}
    for shard in plan.shards:
        by_split.setdefault(shard.split, []).append(shard)
    for split, shards in by_split.items():
        if not any(lengths[shard] for shard in shards):
            left_out = [reason for shard in shards for _, reason in results[shard].left_out]
            raise PrepareError(
                f"none of the {len(left_out)} images of {split} can be decoded; the first: "
                f"{left_out[0]}"
            )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=plan.features,
        version=plan.version,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[lengths[shard] for shard in shards],
                num_bytes=sum(results[shard].num_bytes for shard in shards),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder,
                    dataset_name=plan.name,
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
            for split, shards in by_split.items()
        ],
        supervised_keys=("image", "label"),
        description=report.describe_size(plan.short_side),
        check_data=False,
    )
    files.write_whole(folder / report.FILE_NAME, json.dumps(report_contents, indent=2) + "\n")
    (folder / _PROGRESS).unlink()
    os.rename(folder, plan.output)
    files.sync_folder(plan.output.parent)


def _problem(path: Path, length: int) -> str:
    try:
        found = num_records(path)
    except OSError as error:
        return str(error)
    return "" if found == length else f"{path.name} has {found} records instead of {length}"


def _check_space(plan: Plan, results: Mapping[Shard, ShardResult]):
    # How much smaller resized images are is not known before.
    if len(results) == len(plan.shards) or plan.short_side:
        return
    needed = plan.num_bytes - sum(result.num_bytes for result in results.values())
    free = shutil.disk_usage(plan.incomplete).free
    if needed > free:
        raise PrepareError(
            f"{plan.incomplete} needs about {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are "
            "free; make room, or choose another --output"
        )


def _read_progress(plan: Plan, check: bool) -> dict[Shard, ShardResult]:
    """Return the results of finished shards; begin the progress file if there is none."""
    path = plan.incomplete / _PROGRESS
    head = {"fingerprint": plan.fingerprint, "check": check}
    if plan.leave_out:
        head["leave_out"] = True
    if plan.short_side:
        head["short_side"] = plan.short_side
    # Of a line that an interruption cut short the shard is written again.
    lines = list(files.read_json_lines(path)) if path.exists() else []
    if not lines:
        files.write_whole(path, json.dumps(head) + "\n")
        return {}
    if lines[0] != head:
        raise PrepareError(
            f"{plan.incomplete} was begun with other images or options; continue with those, or "
            "delete that folder"
        )
    shards = {str(shard.path): shard for shard in plan.shards}
    return {
        shards[line.pop("shard")]: ShardResult(**line)
        for line in lines[1:]
        if line.get("shard") in shards and (plan.incomplete / line["shard"]).exists()
    }


def _end_line(path: Path) -> None:
    """End the line that an interruption cut short, before the next one begins."""
    with open(path, "r+b") as file:
        file.write(files.missing_newline(file))
