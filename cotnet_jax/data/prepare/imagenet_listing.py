"""List ImageNet's images, in the official tar files or in folders, and compare with the facts."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from tqdm import tqdm

from cotnet_jax.data import imagenet
from cotnet_jax.data.prepare.listing import (
    VALIDATION_FOLDERS,
    ImageFile,
    Listing,
    SourceError,
    check_classes,
    list_class_folders,
    list_images,
)


def list_imagenet(source: Path, pool: Executor) -> Listing:
    """List ImageNet's images from the official tar files or from folders.

    Each split is looked for by itself: ILSVRC2012_img_train.tar or train/WNID/*.JPEG, and
    ILSVRC2012_img_val.tar, val/WNID/*.JPEG or val/*.JPEG.

    Raises:
      SourceError: neither split is there, or a split has unknown classes or a name twice.
    """
    listing = Listing({}, imagenet.wnids())
    _list_train(source, listing, pool)
    _list_validation(source, listing, pool)
    listing.splits = {split: images for split, images in listing.splits.items() if images}
    if not listing.splits:
        raise SourceError(
            f"{source} has none of {imagenet.TRAIN_TAR}, {imagenet.VALIDATION_TAR}, "
            "train/WNID/*.JPEG, val/WNID/*.JPEG, val/*.JPEG, nor a TFDS copy of "
            f"{imagenet.NAME} (dataset_info.json)"
        )
    _check_names(listing)
    listing.differences += count_differences(
        {split: len(images) for split, images in listing.splits.items()}
    )
    listing.differences += _label_differences(listing)
    return listing


def count_differences(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for every split whose number of images is not the official one."""
    return [
        f"{split}: {counts.get(split, 0):,} images, the official set has {official:,}"
        for split, official in imagenet.NUM_IMAGES.items()
        if counts.get(split, 0) != official
    ]


def _list_train(source: Path, listing: Listing, pool: Executor):
    archive, folder = source / imagenet.TRAIN_TAR, source / "train"
    if archive.is_file():
        listing.archives.append(archive)
        listing.splits["train"] = _list_train_tar(archive, listing.class_names, pool)
    elif folder.is_dir():
        images, differences = list_class_folders(folder, listing.class_names, pool)
        listing.splits["train"] = images
        listing.differences += differences


def _list_validation(source: Path, listing: Listing, pool: Executor):
    archive = source / imagenet.VALIDATION_TAR
    folders = [source / name for name in VALIDATION_FOLDERS if (source / name).is_dir()]
    if archive.is_file():
        listing.archives.append(archive)
        images = _list_validation_tar(archive)
        listing.splits["validation"] = _label_by_number(images, listing.class_names, archive)
    elif folders and any(path.is_dir() for path in folders[0].iterdir()):
        images, differences = list_class_folders(folders[0], listing.class_names, pool)
        listing.splits["validation"] = images
        listing.differences += differences
    elif folders:
        images, _ = list_images(str(folders[0]))
        listing.splits["validation"] = _label_by_number(images, listing.class_names, folders[0])


def _list_train_tar(path: Path, class_names: Sequence[str], pool: Executor) -> list[ImageFile]:
    with tarfile.open(path, mode="r:") as outer:
        members = [member for member in outer if member.isfile()]
    wnids = [Path(member.name).stem for member in members]
    check_classes(path, wnids, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    listed = pool.map(_list_inner_tar, [path] * len(members), [m.offset_data for m in members])
    bar = tqdm(zip(wnids, listed, strict=True), "listing train", total=len(wnids), unit=" classes")
    return [
        ImageFile(name, label_of[wnid], str(path), offset, size)
        for wnid, members_of_class in bar
        for name, offset, size in members_of_class
    ]


def _list_inner_tar(path: Path, start: int) -> list[tuple[str, int, int]]:
    """Return (name, offset in the outer file, size) of the files in the tar that begins there."""
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as inner:
            return [
                (Path(member.name).name, member.offset_data, member.size)
                for member in inner
                if member.isfile()
            ]


def _list_validation_tar(path: Path) -> list[ImageFile]:
    with tarfile.open(path, mode="r:") as archive:
        bar = tqdm(archive, "listing validation", unit=" images")
        return [
            ImageFile(Path(member.name).name, -1, str(path), member.offset_data, member.size)
            for member in bar
            if member.isfile()
        ]


def _label_by_number(
    images: Iterable[ImageFile], class_names: Sequence[str], where: Path
) -> list[ImageFile]:
    """Label validation images by the numbers in their names."""
    label_of = {name: label for label, name in enumerate(class_names)}
    truth = imagenet.validation_wnids()
    labelled, strange = [], []
    for image in images:
        number = imagenet.validation_number(image.name)
        if number:
            labelled.append(image._replace(label=label_of[truth[number - 1]]))
        else:
            strange.append(image.name)
    if strange:
        raise SourceError(
            f"{where}: {len(strange)} file names are not like {imagenet.validation_name(1)}, so "
            f"the labels are unknown; the first are {', '.join(sorted(strange)[:5])}"
        )
    return labelled


def _check_names(listing: Listing):
    problems = []
    for split, images in listing.splits.items():
        counts = Counter(image.name for image in images)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            problems.append(f"{split}: {len(repeated)} names, the first {', '.join(repeated[:5])}")
    if problems:
        raise SourceError(f"the same file name is in several classes: {'; '.join(problems)}")


def _label_differences(listing: Listing) -> list[str]:
    differences = []
    for split, images in listing.splits.items():
        absent = len(listing.class_names) - len({image.label for image in images})
        if absent:
            differences.append(f"{split}: no images of {absent} classes")
    truth = imagenet.validation_wnids()
    wrong = [
        image.name
        for image in listing.splits.get("validation", [])
        if (number := imagenet.validation_number(image.name))
        and truth[number - 1] != listing.class_names[image.label]
    ]
    if wrong:
        differences.append(
            f"validation: {len(wrong)} images are in another class's folder than in the official "
            f"set, the first {', '.join(sorted(wrong)[:5])}"
        )
    return differences
