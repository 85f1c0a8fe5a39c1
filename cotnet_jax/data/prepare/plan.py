"""The plan of a dataset: which file gets which images, in which order."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils

from cotnet_jax.data import imagenet
from cotnet_jax.data.dataset_folder import DatasetError, open_folder
from cotnet_jax.data.prepare.listing import Listing, SourceError
from cotnet_jax.data.prepare.shards import Shard

# Bytes of a record besides the image, to estimate the size on disk.
_RECORD_OVERHEAD = 100


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to write.

    Attributes:
      name: TFDS name, with which every file's name begins.
      version: TFDS version.
      output: the final folder.
      features: TFDS features of a record.
      shards: all files.
      num_bytes: estimated size on disk, of images that are not resized.
      plain_jpeg, leave_out, short_side: as in ``shards.write``.
      fingerprint: differs for other images, which an interrupted run must not be continued with.
    """

    name: str
    version: str
    output: Path
    features: tfds.features.FeaturesDict
    shards: tuple[Shard, ...]
    num_bytes: int
    plain_jpeg: bool
    leave_out: bool
    fingerprint: str
    short_side: int = 0

    @property
    def incomplete(self) -> Path:
        """The folder that becomes ``output`` when everything is written."""
        return self.output.with_name(f"incomplete_{self.output.name}")


def plan_images(
    name: str,
    version: str,
    output: Path,
    listing: Listing,
    features: tfds.features.FeaturesDict,
    *,
    plain_jpeg: bool,
    leave_out: bool,
    short_side: int = 0,
) -> Plan:
    """Order and divide images as TFDS does: by the hash of their names, into equal shards."""
    shards, total, fingerprint = [], 0, hashlib.sha256()
    for split, unordered in sorted(listing.splits.items()):
        hasher = hashing.Hasher(split)
        images = sorted(unordered, key=lambda image: hasher.hash_key(image.name))
        size = sum(image.size + _RECORD_OVERHEAD for image in images)
        count = shard_utils.ShardConfig.calculate_number_shards(size, len(images))
        stops = shard_utils.get_shard_boundaries(len(images), count)
        starts = [0, *stops[:-1]]
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            path = Path(_file_name(name, split, index, count))
            shards.append(Shard(path, split, start, stop - start, tuple(images[start:stop])))
        total += size
        for image in images:
            fingerprint.update(f"{split} {image.name} {image.label} {image.size}\n".encode())
    return Plan(
        name=name,
        version=version,
        output=output,
        features=features,
        shards=tuple(shards),
        num_bytes=total,
        plain_jpeg=plain_jpeg,
        leave_out=leave_out,
        fingerprint=fingerprint.hexdigest(),
        short_side=short_side,
    )


def plan_copy(builder: tfds.core.DatasetBuilder, output: Path, *, short_side: int = 0) -> Plan:
    """Plan to copy a TFDS dataset in TFRecord, shard by shard, in its own order."""
    shards, total = [], 0
    for split, info in builder.info.splits.items():
        first = 0
        lengths = info.shard_lengths
        for index, (source, length) in enumerate(zip(info.filepaths, lengths, strict=True)):
            path = Path(_file_name(builder.name, split, index, len(lengths)))
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
        leave_out=False,
        fingerprint=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        short_side=short_side,
    )


def find_tfrecord_copy(source: Path) -> tfds.core.DatasetBuilder | None:
    """Return the TFDS copy of ImageNet in or under a folder; None if there is none.

    Raises:
      SourceError: there is a TFDS dataset, but damaged, not ImageNet or not in TFRecord.
    """
    patterns = ("", "5.*/", f"{imagenet.NAME}/5.*/")
    found = [path for pattern in patterns for path in source.glob(f"{pattern}dataset_info.json")]
    if not found:
        return None
    try:
        builder = open_folder(sorted(found)[-1].parent)
    except DatasetError as error:
        raise SourceError(str(error)) from None
    file_format = builder.info.file_format.value
    if (builder.name, file_format) != (imagenet.NAME, "tfrecord"):
        raise SourceError(
            f"{builder.data_dir} is {builder.name} in the {file_format} format; expected "
            f"{imagenet.NAME} as tfrecord"
        )
    return builder


def name_and_version(output: Path) -> tuple[str, str]:
    """Return the TFDS name and version for an output folder .../NAME or .../NAME/VERSION."""
    if tfds.core.Version.is_valid(output.name):
        return name_and_version(output.parent)[0], output.name
    name = re.sub(r"\W+", "_", output.name.lower()).strip("_")
    return (name if name[:1].isalpha() else f"images_{name}"), "1.0.0"


def _file_name(name: str, split: str, index: int, count: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"
