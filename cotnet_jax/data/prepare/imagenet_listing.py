"""List ImageNet's images, in the official tar files or in folders, and compare with the facts."""

import contextlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from cotnet_jax.data import imagenet
from cotnet_jax.data.file_names import (
    LEFTOVER,
    as_text,
    is_leftover,
    left_out_lines,
    subfolders,
)
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
      SourceError: neither split is there, a tar file is damaged, or a split has unknown classes
        or a name twice.
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
        images, differences = _list_train_tar(archive, listing.class_names, pool)
        listing.splits["train"] = images
        listing.differences += differences
    elif folder.is_dir():
        images, differences = list_class_folders(folder, listing.class_names, pool)
        listing.splits["train"] = images
        listing.differences += differences


def _list_validation(source: Path, listing: Listing, pool: Executor):
    archive = source / imagenet.VALIDATION_TAR
    folders = [source / name for name in VALIDATION_FOLDERS if (source / name).is_dir()]
    if archive.is_file():
        listing.archives.append(archive)
        images, differences = _list_validation_tar(archive)
        listing.differences += differences
        listing.splits["validation"] = _label_by_number(images, listing.class_names, archive)
    elif folders and subfolders(folders[0]):
        images, differences = list_class_folders(folders[0], listing.class_names, pool)
        listing.splits["validation"] = images
        listing.differences += differences
    elif folders:
        images, others = list_images(str(folders[0]))
        listing.differences += left_out_lines(folders[0], others)
        listing.splits["validation"] = _label_by_number(images, listing.class_names, folders[0])


# Name, offset in the file and size of a member of a tar file.
_Member = tuple[str, int, int]


def _list_train_tar(
    path: Path, class_names: Sequence[str], pool: Executor
) -> tuple[list[ImageFile], list[str]]:
    """Return the images of the training archive, and sentences on what was left out."""
    members, left_out = _list_tar(path)
    wnids = [Path(name).stem for name, _, _ in members]
    check_classes(path, wnids, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    listed = pool.map(_list_inner_tar, [path] * len(members), members)
    bar = tqdm(zip(wnids, listed, strict=True), "listing train", total=len(wnids), unit=" classes")
    images = []
    for wnid, (members_of_class, others) in bar:
        images += [
            ImageFile(name, label_of[wnid], str(path), offset, size)
            for name, offset, size in members_of_class
        ]
        left_out += [f"{wnid}.tar/{name}" for name in others]
    return images, _left_out(path, left_out)


def _list_inner_tar(path: Path, inner: _Member) -> tuple[list[_Member], list[str]]:
    """Return the files of the tar file that is a member of another one, and what was left out."""
    members, left_out = _list_tar(path, inner)
    if not members:
        raise SourceError(f"{path}: its member {inner[0]} has no files; download it again")
    return members, left_out


def _list_validation_tar(path: Path) -> tuple[list[ImageFile], list[str]]:
    members, left_out = _list_tar(path)
    images = [ImageFile(name, -1, str(path), offset, size) for name, offset, size in members]
    return images, _left_out(path, left_out)


def _list_tar(path: Path, inner: _Member | None = None) -> tuple[list[_Member], list[str]]:
    """List a tar file or, with ``inner``, the tar file that is this member of it.

    Returns:
      The files in it, their offsets counted from the beginning of the outer file, and the names of
      what was left out.

    Raises:
      SourceError: it is not a tar file, or is damaged or has no end.
    """
    where = f"{path}: its member {inner[0]}" if inner else str(path)
    start, size = inner[1:] if inner else (0, path.stat().st_size)
    with open(path, "rb") as outer, _explained(where):
        # Without its bounds a tar file that has no end would go on into its neighbour.
        file = _Part(outer, start, size)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = list(
                tqdm(archive, f"listing {path.name}", unit=" files", disable=bool(inner))
            )
            # Where no further header could be read: tarfile takes anything for an end.
            file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end after byte {archive.offset:,} of {size:,}")
    names = [as_text(Path(member.name).name) for member in members]
    files: list[_Member] = []
    left_out = []
    for name, member in zip(names, members, strict=True):
        # A sparse file is not stored in one piece.
        if member.isreg() and not member.issparse() and not is_leftover(name):
            files.append((name, start + member.offset_data, member.size))
        elif not member.isdir():
            left_out.append(name)
    return files, left_out


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{where} is not a whole, uncompressed tar file ({error}); download it again"
        ) from None


def _left_out(path: Path, names: Iterable[str]) -> list[str]:
    return list(left_out_lines(path, [(name, LEFTOVER) for name in names]))


class _Part(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size = file, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


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
