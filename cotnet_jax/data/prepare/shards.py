"""One shard of a dataset: reading its images, checking them, writing them as ArrayRecord."""

import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import grain
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cotnet_jax.data import transforms
from cotnet_jax.data.prepare.listing import ImageFile

# What TFDS re-encodes with when it turns ImageNet's CMYK and PNG images into plain JPEG.
_JPEG_QUALITY = 100


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one file will hold.

    Attributes:
      path: of the finished file.
      split: the split it belongs to.
      first: index in the split of its first record.
      length: number of records.
      images: the records, or () where a TFRecord file is copied.
      tfrecord: the TFRecord file to copy, or "".
    """

    path: Path
    split: str
    first: int
    length: int
    images: Sequence[ImageFile] = ()
    tfrecord: str = ""


@dataclasses.dataclass
class Written:
    """What was written; kept in the progress file, so that a later run need not look again.

    Attributes:
      num_bytes: of all records together.
      reencoded: file names of images that were turned into plain RGB JPEG.
      undecodable: (index in the split, file name, why) of images kept as they are.
    """

    num_bytes: int = 0
    reencoded: list[str] = dataclasses.field(default_factory=list)
    undecodable: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)


def write(shard: Shard, plain_jpeg: bool, check: bool) -> Written:
    """Writes a shard under a temporary name, then gives it its own.

    Args:
      shard: what to write.
      plain_jpeg: turn what is not RGB or grey JPEG into RGB JPEG, as TFDS's imagenet2012 does.
      check: decode every image to find those that cannot be.

    Raises:
      OSError: a file cannot be read or written; the finished file does not exist then.
    """
    result = Written()
    temporary = shard.path.with_name(f"writing_{shard.path.name}")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        records = (
            _copied(shard, check, result)
            if shard.tfrecord
            else _serialized(shard, plain_jpeg, check, result)
        )
        count = 0
        for record in records:
            writer.write(record)
            result.num_bytes += len(record)
            count += 1
    finally:
        writer.close()
    if count != shard.length:
        raise OSError(f"{shard.tfrecord or shard.path}: {count} records instead of {shard.length}")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, shard.path)
    return result


def image_features(class_names: Sequence[str], jpeg: bool) -> tfds.features.FeaturesDict:
    """The features of TFDS's imagenet2012, with any class names."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg" if jpeg else None),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )


def _serialized(shard: Shard, plain_jpeg: bool, check: bool, result: Written) -> Iterator[bytes]:
    serializer = _serializer()
    with _Files() as files:
        for index, image in enumerate(shard.images, shard.first):
            data = files.read(image)
            stored, why_not = _stored(data, plain_jpeg, check)
            if stored is not data:
                result.reencoded.append(image.name)
            if why_not:
                result.undecodable.append((index, image.name, why_not))
            example = {"image": stored, "label": image.label, "file_name": image.name}
            # TFDS's own call leaves the fields' order to chance.
            yield serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _copied(shard: Shard, check: bool, result: Written) -> Iterator[bytes]:
    """The records of a TFRecord file, which hold the same serialized examples."""
    parser = _parser()
    records = iter(grain.experimental.TFRecordIterDataset(shard.tfrecord))
    for index in itertools.count(shard.first):
        try:
            record = next(records)
        except StopIteration:
            return
        except ValueError as error:
            why = "it is damaged or was not copied to its end"
            raise OSError(f"{shard.tfrecord}, record {index - shard.first}: {why}") from error
        if check:
            example = parser.parse_example(record)
            _, why_not = _stored(example["image"], plain_jpeg=False, check=True)
            if why_not:
                name = example["file_name"].decode()
                result.undecodable.append((index, name, why_not))
        yield record


def _stored(data: bytes, plain_jpeg: bool, check: bool) -> tuple[bytes, str]:
    """The bytes to store for an image, and why it cannot be decoded ("" if it can)."""
    convert = plain_jpeg and not _is_plain_jpeg(data)
    if not (convert or check):
        return data, ""
    try:
        image = transforms.decode(data)
    except transforms.DecodeError as error:
        return data, str(error)
    if not convert:
        return data, ""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue(), ""


def _is_plain_jpeg(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data, strict=False)[2] not in ("CMYK", "YCCK")
    except ValueError:
        return False


class _Files:
    """Reads images, leaving the last file open: in a tar the next one is in the same."""

    def __init__(self):
        self._name, self._file = "", None

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exc_info):
        self._close()

    def read(self, image: ImageFile) -> bytes:
        if image.file != self._name:
            self._close()
            self._name, self._file = image.file, _open(image.file)
        self._file.seek(image.offset)
        data = self._file.read(image.size)
        if len(data) != image.size:
            raise OSError(
                f"{image.file}: {image.name} ends after {len(data)} of {image.size} bytes"
            )
        return data

    def _close(self):
        if self._file:
            self._file.close()


def _open(path: str) -> BinaryIO:
    # The records are in random order: reading ahead would be in vain.
    return open(path, "rb", buffering=0)


@functools.cache
def _serializer():
    info = image_features(["any"], jpeg=True).get_serialized_info()
    return tfds.core.example_serializer.ExampleSerializer(info)


@functools.cache
def _parser():
    info = image_features(["any"], jpeg=True).get_serialized_info()
    return tfds.core.example_parser.ExampleParserNp(info)
