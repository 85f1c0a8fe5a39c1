"""Write one shard of a dataset: read its images, check them, store them as ArrayRecord."""

import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import grain
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cotnet_jax.data import transforms
from cotnet_jax.data.prepare.listing import ImageFile
from cotnet_jax.data.prepare.shrink import shrink

# As in TFDS's conversion of ImageNet's CMYK and PNG images.
_JPEG_QUALITY = 100


@dataclasses.dataclass(frozen=True)
class Shard:
    """The planned contents of one file.

    Attributes:
      path: of the finished file.
      split: the split that the file belongs to.
      first: index of the first record in the split.
      length: number of records, with the images that are left out as undecodable.
      images: the images in order; () if a TFRecord file is copied.
      tfrecord: path of the TFRecord file to copy, or "".
    """

    path: Path
    split: str
    first: int
    length: int
    images: Sequence[ImageFile] = ()
    tfrecord: str = ""


@dataclasses.dataclass
class ShardResult:
    """What was written to a shard; a line of the progress file.

    Attributes:
      num_bytes: size of all records together.
      reencoded: file names of the images that were converted to RGB JPEG in their own size.
      resized: number of images that were made smaller.
      undecodable: (index in the split, file name, reason) of the images that cannot be decoded and
        are stored unchanged.
      left_out: (file name, reason) of those that are not stored.
    """

    num_bytes: int = 0
    reencoded: list[str] = dataclasses.field(default_factory=list)
    resized: int = 0
    undecodable: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Stored(NamedTuple):
    """What is stored for an image.

    Attributes:
      data: the compressed image.
      error: why it cannot be decoded; "" if it can, or was not tried.
      resized: whether it was made smaller.
    """

    data: bytes
    error: str = ""
    resized: bool = False


def write(
    shard: Shard, plain_jpeg: bool, check: bool, leave_out: bool, short_side: int = 0
) -> ShardResult:
    """Write a shard to a temporary file and rename it.

    Args:
      shard: what to write.
      plain_jpeg: convert what is not RGB or grey JPEG to RGB JPEG, as TFDS's imagenet2012 does.
      check: decode every image to find those that cannot be decoded.
      leave_out: do not store those.
      short_side: resize images whose short side is longer to this; 0 resizes none.

    Raises:
      OSError: a file cannot be read or written, or the number of records is wrong; the shard's
        file does not exist then.
    """
    result = ShardResult()
    temporary = shard.path.with_name(f"writing_{os.getpid()}_{shard.path.name}")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        records = (
            _copy_records(shard, check, short_side, result)
            if shard.tfrecord
            else _make_records(shard, plain_jpeg, check, leave_out, short_side, result)
        )
        count = 0
        for record in records:
            writer.write(record)
            result.num_bytes += len(record)
            count += 1
    finally:
        writer.close()
    if count != (expected := shard.length - len(result.left_out)):
        raise OSError(f"{shard.tfrecord or shard.path}: {count} records instead of {expected}")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, shard.path)
    return result


def image_features(class_names: Sequence[str], jpeg: bool) -> tfds.features.FeaturesDict:
    """Return the features of TFDS's imagenet2012 with the given class names."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg" if jpeg else None),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )


def _make_records(
    shard: Shard,
    plain_jpeg: bool,
    check: bool,
    leave_out: bool,
    short_side: int,
    result: ShardResult,
) -> Iterator[bytes]:
    """Yield the serialized examples of image files."""
    serializer = _serializer()
    with _FileReader() as reader:
        for index, image in enumerate(shard.images, shard.first):
            data = reader.read(image)
            stored, error, resized = convert(data, plain_jpeg, check, short_side)
            result.resized += resized
            if stored is not data and not resized:
                result.reencoded.append(image.name)
            if error and leave_out:
                result.left_out.append((image.name, error))
                continue
            if error:
                result.undecodable.append((index, image.name, error))
            example = {"image": stored, "label": image.label, "file_name": image.name}
            # TFDS's own serialisation leaves the order of the fields to chance.
            yield serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _copy_records(
    shard: Shard, check: bool, short_side: int, result: ShardResult
) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, which are serialized examples of the same format."""
    parser, serializer = _parser(), _serializer()
    records = iter(grain.experimental.TFRecordIterDataset(shard.tfrecord))
    for index in itertools.count(shard.first):
        try:
            record = next(records)
        except StopIteration:
            return
        except ValueError as error:
            raise OSError(
                f"{shard.tfrecord}, record {index - shard.first}: the file is damaged or its copy "
                "is incomplete"
            ) from error
        if check or short_side:
            example = parser.parse_example(record)
            stored = convert(example["image"], False, check, short_side)
            if stored.error:
                name = example["file_name"].decode()
                result.undecodable.append((index, name, stored.error))
            if stored.resized:
                result.resized += 1
                smaller = serializer.get_tf_example({**example, "image": stored.data})
                record = smaller.SerializeToString(deterministic=True)
        yield record


def convert(data: bytes, plain_jpeg: bool, check: bool, short_side: int = 0) -> Stored:
    """Return what to store for an image; the arguments are those of ``write``."""
    convert = plain_jpeg and not _is_plain_jpeg(data)
    if not (convert or check or short_side):
        return Stored(data)
    try:
        image, orientation = transforms.decode_as_stored(data)
        if 0 < short_side < min(image.shape[:2]):
            return Stored(shrink(image, short_side, orientation), resized=True)
        if not convert:
            return Stored(data)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    # Sides above 65,535 pixels cannot be stored as JPEG.
    except (transforms.DecodeError, MemoryError, OSError) as error:
        return Stored(data, str(error) or "not enough memory")
    return Stored(file.getvalue())


def _is_plain_jpeg(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data, strict=False)[2] not in ("CMYK", "YCCK")
    except ValueError:
        return False


class _FileReader:
    """Reads images and keeps the last file open: in a tar file the next image is in it, too."""

    def __init__(self) -> None:
        self._name = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_FileReader":
        return self

    def __exit__(self, *exc_info):
        self._close()

    def read(self, image: ImageFile) -> bytes:
        if self._file is None or image.file != self._name:
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
            self._file = None


def _open(path: str) -> BinaryIO:
    # Unbuffered: images are read in random order, so reading ahead would be in vain.
    return open(path, "rb", buffering=0)


@functools.cache
def _serializer():
    info = image_features(["any"], jpeg=True).get_serialized_info()
    return tfds.core.example_serializer.ExampleSerializer(info)


@functools.cache
def _parser():
    info = image_features(["any"], jpeg=True).get_serialized_info()
    return tfds.core.example_parser.ExampleParserNp(info)
