"""Which images a source holds, where their bytes are, and what differs from the official set."""

import dataclasses
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
OFFICIAL_COUNTS = {"train": 1_281_167, "validation": 50_000}
_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
_VALIDATION_FOLDERS = ("val", "validation", "valid")


class SourceError(ValueError):
    """The source does not hold what was asked for; says what was looked for and where."""


class ImageFile(NamedTuple):
    """One image: its name and label in the dataset, and the bytes' place on disk."""

    name: str
    label: int
    file: str
    offset: int
    size: int


@dataclasses.dataclass
class Listing:
    """What is to be written.

    Attributes:
      splits: the images of each split, in no particular order.
      class_names: a label's name, by label.
      archives: tar files whose checksums are known.
      differences: sentences on what is not as in the official set, or was left out.
    """

    splits: dict[str, list[ImageFile]]
    class_names: Sequence[str]
    archives: list[Path] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)


def list_imagenet(source: Path, pool: Executor) -> Listing:
    """Lists ImageNet's images from the official tar files or from folders.

    Each split is looked for by itself: ILSVRC2012_img_train.tar or train/WNID/*.JPEG, and
    ILSVRC2012_img_val.tar, val/WNID/*.JPEG or val/*.JPEG.

    Raises:
      SourceError: neither split is there, or it holds unknown classes or the same name twice.
    """
    class_names = _tfds_lines("labels.txt")
    listing = Listing({}, class_names)
    if (source / TRAIN_TAR).is_file():
        listing.archives.append(source / TRAIN_TAR)
        listing.splits["train"] = _train_tar(source / TRAIN_TAR, class_names, pool)
    elif (source / "train").is_dir():
        listing.splits["train"] = _class_folders(source / "train", class_names, pool, listing)
    validation = _first_folder(source, _VALIDATION_FOLDERS)
    if (source / VALIDATION_TAR).is_file():
        listing.archives.append(source / VALIDATION_TAR)
        listing.splits["validation"] = _validation_tar(source / VALIDATION_TAR, class_names)
    elif validation and any(path.is_dir() for path in validation.iterdir()):
        listing.splits["validation"] = _class_folders(validation, class_names, pool, listing)
    elif validation:
        images = _folder(str(validation))[0]
        listing.splits["validation"] = _numbered(images, class_names, validation)
    listing.splits = {split: images for split, images in listing.splits.items() if images}
    if not listing.splits:
        raise SourceError(
            f"{source} holds none of {TRAIN_TAR}, {VALIDATION_TAR}, train/WNID/*.JPEG, "
            "val/WNID/*.JPEG, val/*.JPEG, nor a TFDS copy of imagenet2012 (dataset_info.json)"
        )
    _check_names(listing)
    _compare_with_official(listing)
    return listing


def list_folder(source: Path, pool: Executor) -> Listing:
    """Lists any folder of class folders: source/CLASS/*, or source/SPLIT/CLASS/*.

    Labels follow the sorted names of the classes of all splits.

    Raises:
      SourceError: no images, or images where folders are expected.
    """
    top = sorted(path for path in source.iterdir() if path.is_dir())
    if not top:
        raise SourceError(f"{source} has no folders; one folder a class is expected in it")
    nested = [path for path in top if any(child.is_dir() for child in path.iterdir())]
    flat = [path for path in top if path not in nested]
    if nested and flat:
        raise SourceError(
            f"{source} mixes two layouts: {nested[0].name}/ holds folders and {flat[0].name}/ does "
            "not; expected CLASS/* everywhere, or SPLIT/CLASS/* everywhere"
        )
    folders = {_split_name(path.name): path for path in nested} or {"train": source}
    classes = {
        path.name for folder in folders.values() for path in folder.iterdir() if path.is_dir()
    }
    listing = Listing({}, sorted(classes))
    for split, folder in folders.items():
        images = _class_folders(folder, listing.class_names, pool, listing)
        # Two classes may use the same file names.
        listing.splits[split] = [
            image._replace(name=f"{listing.class_names[image.label]}/{image.name}")
            for image in images
        ]
        absent = sorted(classes - {listing.class_names[image.label] for image in images})
        if absent:
            listing.differences.append(
                f"{split}: no images of {len(absent)} classes, the first {', '.join(absent[:5])}"
            )
    empty = [split for split, images in listing.splits.items() if not images]
    if empty:
        raise SourceError(
            f"no images ({', '.join(sorted(_SUFFIXES))}) in {source} for {', '.join(empty)}"
        )
    return listing


def _train_tar(path: Path, class_names: Sequence[str], pool: Executor) -> list[ImageFile]:
    with tarfile.open(path, mode="r:") as outer:
        members = [member for member in outer if member.isfile()]
    wnids = [Path(member.name).stem for member in members]
    _check_classes(path, wnids, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    inner = pool.map(_inner_tar, [path] * len(members), [m.offset_data for m in members])
    bar = tqdm(zip(wnids, inner, strict=True), "listing train", total=len(wnids), unit=" classes")
    return [
        ImageFile(name, label_of[wnid], str(path), offset, size)
        for wnid, found in bar
        for name, offset, size in found
    ]


def _inner_tar(path: Path, start: int) -> list[tuple[str, int, int]]:
    """Names, first bytes in the outer file, and sizes of the images in the tar at start."""
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as inner:
            return [
                (Path(member.name).name, member.offset_data, member.size)
                for member in inner
                if member.isfile()
            ]


def _validation_tar(path: Path, class_names: Sequence[str]) -> list[ImageFile]:
    with tarfile.open(path, mode="r:") as archive:
        bar = tqdm(archive, "listing validation", unit=" images")
        images = [
            ImageFile(Path(member.name).name, -1, str(path), member.offset_data, member.size)
            for member in bar
            if member.isfile()
        ]
    return _numbered(images, class_names, path)


def _class_folders(
    folder: Path, class_names: Sequence[str], pool: Executor, listing: Listing
) -> list[ImageFile]:
    paths = sorted(path for path in folder.iterdir() if path.is_dir())
    _check_classes(folder, [path.name for path in paths], class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    found = pool.map(_folder, map(str, paths))
    bar = tqdm(
        zip(paths, found, strict=True), f"listing {folder.name}", total=len(paths), unit=" classes"
    )
    images, ignored = [], []
    for path, (here, others) in bar:
        images += [image._replace(label=label_of[path.name]) for image in here]
        ignored += others
    if ignored:
        listing.differences.append(
            f"{folder}: left out {len(ignored)} files that are no images by their names, "
            f"the first {', '.join(sorted(ignored)[:3])}"
        )
    return images


def _folder(folder: str) -> tuple[list[ImageFile], list[str]]:
    """Images in a folder, without labels, and the other files' paths."""
    images, others = [], []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            images.append(ImageFile(path.name, -1, str(path), 0, path.stat().st_size))
        elif path.is_file():
            others.append(str(path))
    return images, others


def _numbered(
    images: Iterable[ImageFile], class_names: Sequence[str], where: Path
) -> list[ImageFile]:
    """Labels of validation images by the number in their names."""
    label_of = {name: label for label, name in enumerate(class_names)}
    truth = _tfds_lines("validation_labels.txt")
    labelled, strange = [], []
    for image in images:
        match = _VALIDATION_NAME.fullmatch(image.name)
        if match and 1 <= int(match[1]) <= len(truth):
            labelled.append(image._replace(label=label_of[truth[int(match[1]) - 1]]))
        else:
            strange.append(image.name)
    if strange:
        raise SourceError(
            f"{where}: {len(strange)} names are not like ILSVRC2012_val_00000001.JPEG, so their "
            f"labels are unknown; the first are {', '.join(sorted(strange)[:5])}"
        )
    return labelled


def _check_classes(where: Path, found: Sequence[str], class_names: Sequence[str]):
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise SourceError(
            f"{where} holds {len(unknown)} classes that are not among the {len(class_names)} known "
            f"ones, the first {', '.join(unknown[:5])}; for images of your own use\n"
            "  python -m cotnet_jax.data.prepare folder --source=IMAGES --output=FOLDER"
        )


def _check_names(listing: Listing):
    problems = []
    for split, images in listing.splits.items():
        counts = Counter(image.name for image in images)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            problems.append(f"{split}: {len(twice)} names, the first {', '.join(twice[:5])}")
    if problems:
        raise SourceError(f"the same file name is in several classes: {'; '.join(problems)}")


def _compare_with_official(listing: Listing):
    for split, expected in OFFICIAL_COUNTS.items():
        images = listing.splits.get(split, [])
        if len(images) != expected:
            listing.differences.append(
                f"{split}: {len(images):,} images, the official set has {expected:,}"
            )
        absent = len(listing.class_names) - len({image.label for image in images})
        if images and absent:
            listing.differences.append(f"{split}: no images of {absent} classes")
    truth = _tfds_lines("validation_labels.txt")
    wrong = [
        image.name
        for image in listing.splits.get("validation", [])
        if (match := _VALIDATION_NAME.fullmatch(image.name))
        and truth[int(match[1]) - 1] != listing.class_names[image.label]
    ]
    if wrong:
        listing.differences.append(
            f"validation: {len(wrong)} images are in another class's folder than in the official "
            f"set, the first {', '.join(sorted(wrong)[:5])}"
        )


def _first_folder(source: Path, names: Iterable[str]) -> Path | None:
    return next((source / name for name in names if (source / name).is_dir()), None)


def _split_name(folder: str) -> str:
    name = re.sub(r"\W+", "_", folder.lower())
    return "validation" if name in _VALIDATION_FOLDERS else name


def _tfds_lines(name: str) -> list[str]:
    """The words of a file that TFDS ships with its imagenet2012."""
    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()


def official_checksums() -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of each official tar file, by name, as shipped with TFDS."""
    words = _tfds_lines("checksums.tsv")
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    return {Path(url).name: (int(size), digest) for url, size, digest in rows}
