"""A whole dataset: planning its shards, writing them in parallel, going on after an interruption.

Everything is written in a folder `incomplete_VERSION` beside the final one, which it becomes when
all is there. Finished shards are noted in its progress file and not written again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import Executor, as_completed
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils
from tqdm import tqdm

from cotnet_jax.data.prepare.listing import Listing
from cotnet_jax.data.prepare.shards import Shard, Written, write

REPORT = "prepare_report.json"
_PROGRESS = "progress.jsonl"
# Serialized fields around an image's bytes, for guessing the size on disk.
_RECORD_OVERHEAD = 100


class PrepareError(RuntimeError):
    """The dataset cannot be written here and now; says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to be written.

    Attributes:
      name: TFDS name, the start of every file's name.
      version: TFDS version.
      output: the final folder.
      features: TFDS features of a record.
      shards: all files.
      num_bytes: guess of the size on disk.
      plain_jpeg: see shards.write.
      fingerprint: equal for equal contents; guards against going on with other images.
    """

    name: str
    version: str
    output: Path
    features: tfds.features.FeaturesDict
    shards: tuple[Shard, ...]
    num_bytes: int
    plain_jpeg: bool
    fingerprint: str

    @property
    def incomplete(self) -> Path:
        return self.output.with_name(f"incomplete_{self.output.name}")


def plan_images(
    name: str,
    version: str,
    output: Path,
    listing: Listing,
    features: tfds.features.FeaturesDict,
    plain_jpeg: bool,
) -> Plan:
    """Orders and divides images as TFDS does: by the hash of their names, in equal shards."""
    shards, total, fingerprint = [], 0, hashlib.sha256()
    for split, unordered in sorted(listing.splits.items()):
        hasher = hashing.Hasher(split)
        images = sorted(unordered, key=lambda image: hasher.hash_key(image.name))
        size = sum(image.size + _RECORD_OVERHEAD for image in images)
        count = shard_utils.ShardConfig.calculate_number_shards(size, len(images))
        stops = shard_utils.get_shard_boundaries(len(images), count)
        starts = [0, *stops[:-1]]
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            path = Path(_filename(name, split, index, count))
            shards.append(Shard(path, split, start, stop - start, tuple(images[start:stop])))
        total += size
        for image in images:
            fingerprint.update(f"{split} {image.name} {image.label} {image.size}\n".encode())
    return Plan(
        name, version, output, features, tuple(shards), total, plain_jpeg, fingerprint.hexdigest()
    )


def plan_copy(builder: tfds.core.DatasetBuilder, output: Path) -> Plan:
    """A TFRecord dataset, shard by shard in its own order."""
    shards, total = [], 0
    for split, info in builder.info.splits.items():
        first = 0
        lengths = info.shard_lengths
        for index, (source, length) in enumerate(zip(info.filepaths, lengths, strict=True)):
            path = Path(_filename(builder.name, split, index, len(lengths)))
            shards.append(Shard(path, split, first, length, tfrecord=str(source)))
            first += length
            total += Path(source).stat().st_size
    contents = [(str(shard.path), shard.length, shard.tfrecord) for shard in shards]
    return Plan(
        name=builder.name,
        version=str(builder.version),
        output=output,
        features=builder.info.features,
        shards=tuple(shards),
        num_bytes=total,
        plain_jpeg=False,
        fingerprint=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
    )


def write_dataset(plan: Plan, pool: Executor, check: bool) -> dict[Shard, Written]:
    """Writes the shards that are not there yet, with a progress bar over images.

    Raises:
      PrepareError: the folder holds another dataset's beginning, or too little space is left.
      OSError: from reading or writing; finished shards stay.
    """
    folder = plan.incomplete
    folder.mkdir(parents=True, exist_ok=True)
    done = _read_progress(plan, check)
    todo = [shard for shard in plan.shards if shard not in done]
    written_bytes = sum(written.num_bytes for written in done.values())
    missing, free = plan.num_bytes - written_bytes, shutil.disk_usage(folder).free
    if todo and missing > free:
        raise PrepareError(
            f"{folder} needs about {missing / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; "
            "make room, or choose another --output"
        )
    bar = tqdm(
        desc="writing",
        total=sum(shard.length for shard in plan.shards),
        initial=sum(shard.length for shard in done),
        unit=" images",
    )
    with bar, open(folder / _PROGRESS, "a") as progress:
        futures = {
            pool.submit(
                write, dataclasses.replace(shard, path=folder / shard.path), plan.plain_jpeg, check
            ): shard
            for shard in todo
        }
        try:
            for future in as_completed(futures):
                shard, written = futures[future], future.result()
                line = {"shard": str(shard.path), **dataclasses.asdict(written)}
                progress.write(json.dumps(line) + "\n")
                progress.flush()
                done[shard] = written
                bar.update(shard.length)
        finally:
            for future in futures:
                future.cancel()
    return {shard: done[shard] for shard in plan.shards}


def finish(plan: Plan, written: dict[Shard, Written], report: dict) -> None:
    """Counts the records on disk, adds TFDS's metadata and the report, gives the final name.

    Raises:
      PrepareError: a shard has not as many records as planned.
    """
    folder = plan.incomplete
    wrong = [
        f"{shard.path} has {found} records instead of {shard.length}"
        for shard in plan.shards
        if (found := _num_records(folder / shard.path)) != shard.length
    ]
    if wrong:
        raise PrepareError(
            f"in {folder}: " + "; ".join(wrong) + "; delete these files and run the command again"
        )
    by_split: dict[str, list[Shard]] = {}
    for shard in plan.shards:
        by_split.setdefault(shard.split, []).append(shard)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=plan.features,
        version=plan.version,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.length for shard in shards],
                num_bytes=sum(written[shard].num_bytes for shard in shards),
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
        check_data=False,
    )
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    (folder / _PROGRESS).unlink()
    os.rename(folder, plan.output)


def _filename(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def _num_records(path: Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _read_progress(plan: Plan, check: bool) -> dict[Shard, Written]:
    """The shards already written; starts the progress file where there is none."""
    path = plan.incomplete / _PROGRESS
    head = {"fingerprint": plan.fingerprint, "check": check}
    lines = _json_lines(path) if path.exists() else []
    if not lines:
        path.write_text(json.dumps(head) + "\n")
        return {}
    if lines[0] != head:
        raise PrepareError(
            f"{plan.incomplete} was begun with other images or options; go on with those, or "
            f"delete that folder"
        )
    shards = {str(shard.path): shard for shard in plan.shards}
    return {
        shards[line.pop("shard")]: Written(**line)
        for line in lines[1:]
        if (plan.incomplete / line["shard"]).exists()
    }


def _json_lines(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            # The interruption came while this line was written; what it told is done again.
            break
    return lines
