"""Sources of images: TFDS datasets, prepared folders, the digits, synthetic noise."""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from cotnet_jax import command_line, files
from cotnet_jax.command_line import first_line
from cotnet_jax.data import digits, imagenet
from cotnet_jax.data.dataset_folder import (
    DatasetError,
    check_features,
    check_shards,
    open_folder,
    remedy,
)
from cotnet_jax.data.transforms import DecodeError

_SYNTHETIC_CLASS_NAMES = tuple(f"class {index}" for index in range(imagenet.NUM_CLASSES))
_SYNTHETIC_MARGIN = 64
_PREPARE_FOLDER = f"  {command_line.command('prepare')} folder --source=IMAGES --output="


class Element(TypedDict):
    """One labelled image.

    Attributes:
      image: bytes of a compressed image, or pixels, uint8 [S, S, 3], that are used unchanged.
      label: index of the class.
      file_name: "" where the dataset has none.
    """

    image: bytes | np.ndarray
    label: int
    file_name: str


class Source(Protocol):
    """One split of a dataset, with random access from any thread."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Element:
        """Return an element.

        Raises:
          DecodeError: its record is damaged.
        """


class LabelError(ValueError):
    """A record's label is not that of a class; the message names split, record and label."""


def open_source(data: ml_collections.ConfigDict, split: str) -> Source:
    """Open one split of the dataset named in config.data, or noise in its place.

    Args:
      data: config.data; the fields name, data_dir, fake and, for noise, image_size are read.
      split: name of a split or a TFDS slice of it, such as "train" or "train[:10%]".

    Raises:
      DatasetError: the dataset or the split does not exist, is damaged, or is not in the
        ArrayRecord format.
    """
    if data.name == "synthetic":
        return Synthetic(split, data.image_size, imagenet.NUM_IMAGES, _SYNTHETIC_CLASS_NAMES)
    try:
        builder = _builder(data.name, data.data_dir)
    except DatasetError:
        if data.fake and data.name == imagenet.NAME:
            return Synthetic(split, data.image_size, imagenet.NUM_IMAGES, _SYNTHETIC_CLASS_NAMES)
        raise
    # ImageNet's published accuracy was measured without.
    own = builder.name != imagenet.NAME and _is_folder(data.name)
    source = TfdsSource(builder, split, exif_orientation=own)
    if data.fake:
        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        return Synthetic(split, data.image_size, sizes, source.class_names)
    return source


def find_evaluation_split(data: ml_collections.ConfigDict) -> str:
    """Return the split "validation" of a dataset, or else "test", or its only one.

    Args:
      data: config.data; the fields name and data_dir are read.

    Raises:
      DatasetError: there is no such dataset, or none of these splits.
    """
    if data.name == "synthetic":
        return "validation"
    builder = _builder(data.name, data.data_dir)
    splits = list(builder.info.splits)
    preferred = [name for name in ("validation", "test") if name in splits]
    found = (preferred or splits)[:1] if preferred or len(splits) == 1 else []
    if not found:
        raise DatasetError(
            f"{builder.data_dir} has neither a split 'validation' nor 'test'; choose one of its "
            f"own by --split=SPLIT: {', '.join(splits)}"
        )
    return found[0]


class TfdsSource:
    """A split of a TFDS dataset on disk; its images stay compressed.

    Args:
      builder: the dataset.
      split: as in ``open_source``.
      exif_orientation: the attribute.

    Attributes:
      num_classes, class_names: as in ``Source``.
      exif_orientation: whether images are turned upright where the configuration leaves it open:
        those of a person's own folder, which may come from phones.
    """

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, *, exif_orientation: bool = False
    ):
        info = builder.info
        features = info.features or {}
        missing = {"image", "label"} - set(features)
        if missing:
            raise DatasetError(
                f"{builder.data_dir} has no feature {' and no '.join(sorted(missing))}; "
                "classification needs 'image' and 'label'"
            )
        for name, kind in {"image": tfds.features.Image, "label": tfds.features.ClassLabel}.items():
            if not isinstance(features[name], kind):
                raise DatasetError(
                    f"{builder.data_dir}: its feature {name!r} is {type(features[name]).__name__}; "
                    f"classification needs {kind.__name__}"
                )
        if not features["label"].num_classes:
            raise DatasetError(f"{builder.data_dir}: its feature 'label' has no classes")
        # TFDS passes over such files, and what is in them.
        for name, each in info.splits.items():
            if any(each.shard_lengths) and min(each.shard_lengths) < 1:
                raise _damaged_info(builder, f"a file of split {name!r} has no records")
        try:
            self._source = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
            files = info.splits[split].file_instructions
        except NotImplementedError as error:
            raise DatasetError(
                f"{builder.data_dir} is not in the ArrayRecord format; rewrite it with\n"
                f"  {command_line.command('prepare')} imagenet --source={builder.data_dir} "
                "--output=DATA_DIR"
            ) from error
        # Each format that TFDS reads has exceptions of its own.
        except Exception as error:
            raise _split_error(builder, split, error) from error
        check_shards(builder.data_dir, files)
        self.num_classes = features["label"].num_classes
        self.class_names = _class_names(builder)
        self.exif_orientation = exif_orientation

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Element:
        try:
            element = self._source[index]
            return {
                "image": element["image"],
                "label": int(element["label"]),
                "file_name": element.get("file_name", b"").decode(errors="backslashreplace"),
            }
        # ArrayRecord, Riegeli, protocol buffers and TFDS each have exceptions of their own.
        except Exception as error:
            if not 0 <= index < len(self):
                raise
            raise DecodeError(f"record {index} cannot be read: {error}") from error


@dataclasses.dataclass
class Synthetic:
    """Images of noise that cost next to nothing to make, for benchmarks and dry runs.

    Attributes:
      split: as in ``open_source``.
      image_size: side of the images in pixels.
      sizes: number of images in each split.
      class_names: names of the classes; consecutive images have consecutive labels.
    """

    split: str
    image_size: int
    sizes: Mapping[str, int]
    class_names: Sequence[str]

    def __post_init__(self):
        self._indices = _slices(self.split, self.sizes)
        self._ends = list(itertools.accumulate(map(len, self._indices)))
        side = self.image_size + _SYNTHETIC_MARGIN
        self._canvas = np.random.RandomState(0).randint(0, 256, (side, side, 3), np.uint8)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Element:
        part = bisect.bisect(self._ends, index)
        index = self._indices[part][index - self._ends[part]]
        top, left = divmod(index % _SYNTHETIC_MARGIN**2, _SYNTHETIC_MARGIN)
        window = self._canvas[top : top + self.image_size, left : left + self.image_size]
        return {"image": window, "label": index % self.num_classes, "file_name": ""}


def _damaged_info(builder: tfds.core.DatasetBuilder, what: str) -> DatasetError:
    path = builder.data_path / "dataset_info.json"
    return DatasetError(f"{path}: is damaged ({what}); {remedy(builder.data_dir)}")


def _split_error(builder: tfds.core.DatasetBuilder, split: str, error: Exception) -> DatasetError:
    """Return why a split cannot be opened."""
    splits = builder.info.splits
    if not splits:
        return _damaged_info(builder, "it names no splits")
    if split in splits:
        return _damaged_info(builder, first_line(error))
    with contextlib.suppress(Exception):
        if not splits[split].file_instructions:
            sizes = ", ".join(f"{name} ({each.num_examples})" for name, each in splits.items())
            return DatasetError(
                f"split {split!r} of {builder.data_dir} holds no images; its splits: {sizes}"
            )
    return DatasetError(f"no split {split!r} in {builder.data_dir}; it has {', '.join(splits)}")


def _class_names(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Return the names of the classes; TFDS takes numbers where it cannot read them.

    Raises:
      DatasetError: their file is no text, or has another number of names.
    """
    label = builder.info.features["label"]
    path = builder.data_path / "label.labels.txt"
    if not path.exists():
        return tuple(label.names)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {first_line(error)}; {remedy(builder.data_dir)}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != label.num_classes:
        raise DatasetError(
            f"{path}: names {len(names)} classes of {label.num_classes}; {remedy(builder.data_dir)}"
        )
    return names


def _is_folder(name: str) -> bool:
    return name != "digits" and _folder_path(name).is_dir()


def _folder_path(name: str) -> Path:
    return Path(name if files.is_url(name) else files.expand(name))


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if name == "digits":
        return digits.builder(data_dir)
    data_dir = files.expand(data_dir) if data_dir else ""
    if _is_folder(name):
        return open_folder(_version_dir(_folder_path(name)))
    if name.startswith((".", "/", "~")):
        raise DatasetError(
            f"config.data.name = {name!r}: no such folder; prepare it with\n{_PREPARE_FOLDER}{name}"
        )
    data_dir = data_dir or tfds.core.constants.DATA_DIR
    # For datasets that it does not know TFDS reads the classes' names from there, too.
    for features in (Path(data_dir) / name.split(":")[0].split("/")[0]).rglob("features.json"):
        check_features(features.parent)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise DatasetError(
            f"config.data.name = {name!r} is neither a folder nor a dataset in {data_dir} or of "
            f"TFDS; use 'digits', 'synthetic', a TFDS name such as {imagenet.NAME!r}, or a folder "
            f"prepared by\n{_PREPARE_FOLDER}FOLDER"
        ) from None
    except Exception as error:
        raise DatasetError(
            f"dataset {name!r} in {data_dir} cannot be opened: {first_line(error)}"
        ) from error
    if not builder.is_prepared():
        if builder.name == imagenet.NAME:
            prepare = command_line.command("prepare")
            command = f"{prepare} imagenet --source=SOURCE --output={data_dir}"
        else:
            command = (
                'python -c "import tensorflow_datasets as tfds; tfds.builder('
                f"{name!r}, data_dir={str(data_dir)!r}, file_format='array_record')"
                '.download_and_prepare()"'
            )
        raise DatasetError(
            f"dataset {name!r} is not in {builder.data_dir}; set --config.data.data_dir=DATA_DIR "
            f"if it is elsewhere, or prepare it with\n  {command}"
        )
    return builder


def _version_dir(path: Path) -> Path:
    """Return the folder with dataset_info.json: path itself, or the only such folder inside."""
    if (path / "dataset_info.json").exists():
        return path
    found = sorted(info.parent for info in path.glob("*/dataset_info.json"))
    found = found or sorted(info.parent for info in path.glob("*/*/dataset_info.json"))
    if len(found) != 1:
        what = "no prepared dataset" if not found else f"{len(found)} prepared datasets"
        raise DatasetError(
            f"config.data.name = {str(path)!r} holds {what} (a folder with dataset_info.json)"
            + "".join(f"\n  {folder}" for folder in found)
            + ("\nname one of these, or prepare one with\n" if found else "\nprepare one with\n")
            + f"{_PREPARE_FOLDER}FOLDER"
        )
    return found[0]


def _slices(split: str, sizes: Mapping[str, int]) -> list[range]:
    """Return the range of indices of each summand of a TFDS split such as "train[:9]+test"."""
    infos = {
        name: tfds.core.SplitInfo(
            name=name, shard_lengths=[size], num_bytes=0, filename_template=None
        )
        for name, size in sizes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, KeyError, AssertionError) as error:
        raise DatasetError(
            f"no split {split!r}; the synthetic images have {', '.join(sizes)} (to get another "
            "dataset's splits, name that dataset and set --config.data.fake=True)"
        ) from error
    return [
        range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
        for part in parts
    ]
