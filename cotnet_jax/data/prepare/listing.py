"""Lists of image files: where every image of a dataset is, and its label."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from cotnet_jax import command_line
from cotnet_jax.data.file_names import (
    OUTSIDE,
    as_class_name,
    as_text,
    left_out_lines,
    subfolders,
    walk,
    why_no_image,
)
from cotnet_jax.data.transforms import IMAGE_SUFFIXES

# Usual names of the folder with the validation split, in order of preference.
VALIDATION_FOLDERS = ("val", "validation", "valid")
_SPLITS = {
    "train": ("train", "training"),
    "validation": VALIDATION_FOLDERS,
    "test": ("test", "testing"),
}


class SourceError(ValueError):
    """The source is not as expected; the message says what was looked for and where."""


class ImageFile(NamedTuple):
    """One image: its name and label in the dataset, and the location of its bytes.

    Attributes:
      name: file name in the dataset, unique in its split.
      label: index of the class; -1 where it is not known yet.
      file: path of the image, or of the tar file that contains it.
      offset, size: first byte and number of bytes in that file.
    """

    name: str
    label: int
    file: str
    offset: int
    size: int


@dataclasses.dataclass
class Listing:
    """All images of a dataset.

    Attributes:
      splits: the images of each split, in no particular order.
      class_names: the name of every label.
      archives: the official tar files that contain the images, if any.
      differences: sentences on what was left out or is not as in the official dataset.
    """

    splits: dict[str, list[ImageFile]]
    class_names: Sequence[str]
    archives: list[Path] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)


def list_folder(source: Path, pool: Executor, layout: str = "") -> Listing:
    """List a folder of class folders, source/CLASS/** or source/SPLIT/CLASS/**.

    Labels follow the sorted class names of all splits; folders inside a class folder are of its
    class. What systems and programs leave in folders, links that lead nowhere and the like are left
    out and reported.

    Args:
      source: the folder.
      pool: lists the classes.
      layout: "classes" or "splits", what the folders in ``source`` are; "" decides by their names.

    Raises:
      SourceError: there are no images, or images where folders are expected, or two classes have
        the same name.
    """
    top = subfolders(source)
    if not top:
        raise SourceError(f"{source} has no folders; expected one folder per class")
    in_splits = layout == "splits" or (not layout and _are_splits(source, top))
    folders = {_split_name(path.name): path for path in top} if in_splits else {"train": source}
    if in_splits and len(folders) < len(top):
        raise SourceError(
            f"{source}: several folders are of the same split ({', '.join(p.name for p in top)} "
            f"give {', '.join(folders)}); merge them, or rename all but one"
        )
    classes: set[str] = set()
    for folder in folders.values():
        names = [path.name for path in subfolders(folder)]
        here = set(map(as_class_name, names))
        if "" in here or len(here) < len(names):
            raise SourceError(
                f"{folder}: names of classes must differ in more than spaces around them and in "
                "more than how Unicode writes their accents, and have other characters than "
                f"spaces; found {', '.join(map(ascii, names))[:500]}"
            )
        classes |= here
    listing = Listing({}, sorted(classes))
    if in_splits:
        listing.differences += _left_out_beside(source)
    for split, folder in folders.items():
        images, differences = list_class_folders(folder, listing.class_names, pool, nested=True)
        listing.differences += differences
        # Files of two classes may have the same name.
        listing.splits[split] = [
            image._replace(name=f"{listing.class_names[image.label]}/{image.name}")
            for image in images
        ]
    if len(classes) == 1:
        listing.differences.append(_only_class(folders.values()))
    empty = [split for split, images in listing.splits.items() if not images]
    if empty:
        raise SourceError(
            f"no images ({', '.join(IMAGE_SUFFIXES)}) in {source} for {', '.join(empty)}"
        )
    return listing


def _are_splits(source: Path, top: Sequence[Path]) -> bool:
    """Return whether folders are splits: some are named like one, and all hold folders."""
    nested = [path for path in top if subfolders(path)]
    if not any(_split_name(path.name) in _SPLITS for path in nested):
        return False
    flat = [path for path in top if path not in nested]
    if flat:
        raise SourceError(
            f"{source} mixes two layouts: {nested[0].name}/ holds folders and {flat[0].name}/ does "
            "not; expected SPLIT/CLASS/* everywhere, or CLASS/*, or say which by "
            "--layout=splits or --layout=classes"
        )
    return True


def _only_class(folders: Iterable[Path]) -> str:
    """Return a sentence on a source with one class; its folders may have been meant."""
    (folder, *_) = (path for folder in folders for path in subfolders(folder))
    text = f"there is only one class, {as_class_name(folder.name)}, and a classifier needs two"
    inside = [as_text(path.name) for path in subfolders(folder)]
    if len(inside) < 2:
        return text
    more = ", ..." if len(inside) > 2 else ""
    return (
        f"{text}; if the folders in it ({', '.join(inside[:2])}{more}) are the classes, type "
        f"--source={as_text(str(folder))}"
    )


def list_class_folders(
    folder: Path, class_names: Sequence[str], pool: Executor, *, nested: bool = False
) -> tuple[list[ImageFile], list[str]]:
    """List folder/CLASS/*, or folder/CLASS/** if ``nested``.

    Returns:
      The images, and sentences on what was left out.

    Raises:
      SourceError: a class folder's name is not in ``class_names``.
    """
    paths = subfolders(folder)
    check_classes(folder, [as_class_name(path.name) for path in paths], class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    listed = pool.map(list_images_below if nested else list_images, map(str, paths))
    bar = tqdm(
        zip(paths, listed, strict=True),
        f"listing {as_text(folder.name)}",
        total=len(paths),
        unit=" classes",
    )
    images: list[ImageFile] = []
    left_out: list[tuple[str, str]] = []
    for path, (images_here, others) in bar:
        label = label_of[as_class_name(path.name)]
        images += [image._replace(label=label) for image in images_here]
        left_out += others
    return images, [*_left_out_beside(folder), *left_out_lines(folder, left_out)]


def list_images(folder: str) -> tuple[list[ImageFile], list[tuple[str, str]]]:
    """Return the images in a folder, without labels, and (path, reason) of all else in it.

    The reasons are those of ``file_names``.
    """
    return _list(folder, ((path, why_no_image(path)) for path in sorted(Path(folder).iterdir())))


def list_images_below(folder: str) -> tuple[list[ImageFile], list[tuple[str, str]]]:
    """Do what ``list_images`` does, for the folders inside as well.

    An image's name is its path from ``folder`` on, with "/".
    """
    return _list(folder, walk(folder))


def _list(folder, entries: Iterable[tuple[Path, str]]):
    images, others = [], []
    for path, reason in entries:
        if reason:
            others.append((str(path), reason))
        else:
            name = as_text(path.relative_to(folder).as_posix())
            images.append(ImageFile(name, -1, str(path), 0, path.stat().st_size))
    return images, others


def _left_out_beside(folder: Path) -> Iterator[str]:
    """Yield sentences on what is in a folder beside the folders of classes or splits."""
    taken = set(subfolders(folder))
    left_out = [path for path in folder.iterdir() if path not in taken]
    # What is an image by itself is left out for its place.
    reasons = [(str(path), why_no_image(path) or OUTSIDE) for path in left_out]
    yield from left_out_lines(folder, reasons)


def check_classes(where: Path, found: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise SourceError if a found class is not one of ``class_names``."""
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise SourceError(
            f"{where} has {len(unknown)} classes that are not among the {len(class_names)} known "
            f"ones, the first {', '.join(unknown[:5])}; for a dataset of your own use\n"
            f"  {command_line.command('prepare')} folder --source=IMAGES --output=FOLDER"
        )


def _split_name(folder: str) -> str:
    name = re.sub(r"\W+", "_", folder.lower())
    return next((split for split, names in _SPLITS.items() if name in names), name)
