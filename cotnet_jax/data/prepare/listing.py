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
    as_text,
    left_out_lines,
    subfolders,
    why_no_image,
)
from cotnet_jax.data.transforms import IMAGE_SUFFIXES

# Usual names of the folder with the validation split, in order of preference.
VALIDATION_FOLDERS = ("val", "validation", "valid")


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


def list_folder(source: Path, pool: Executor) -> Listing:
    """List a folder of class folders, source/CLASS/* or source/SPLIT/CLASS/*.

    Labels follow the sorted class names of all splits. What systems and programs leave in folders,
    links that lead nowhere and the like are left out and reported.

    Raises:
      SourceError: there are no images, or images where folders are expected, or two classes have
        the same name.
    """
    top = subfolders(source)
    if not top:
        raise SourceError(f"{source} has no folders; expected one folder per class")
    nested = [path for path in top if subfolders(path)]
    flat = [path for path in top if path not in nested]
    if nested and flat:
        raise SourceError(
            f"{source} mixes two layouts: {nested[0].name}/ holds folders and {flat[0].name}/ does "
            "not; expected CLASS/* everywhere, or SPLIT/CLASS/* everywhere"
        )
    folders = {_split_name(path.name): path for path in nested} or {"train": source}
    if len(folders) < len(nested):
        raise SourceError(
            f"{source}: several folders are of the same split ({', '.join(p.name for p in nested)} "
            f"give {', '.join(folders)}); merge them, or rename all but one"
        )
    names = {path.name for folder in folders.values() for path in subfolders(folder)}
    classes = {class_name(name) for name in names}
    if "" in classes or len(classes) < len(names):
        raise SourceError(
            f"{source}: names of classes must differ in more than spaces around them, and have "
            f"other characters; found {', '.join(sorted(map(repr, names)))[:500]}"
        )
    listing = Listing({}, sorted(classes))
    if nested:
        listing.differences += _left_out_beside(source)
    for split, folder in folders.items():
        images, differences = list_class_folders(folder, listing.class_names, pool)
        listing.differences += differences
        # Files of two classes may have the same name.
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
            f"no images ({', '.join(IMAGE_SUFFIXES)}) in {source} for {', '.join(empty)}"
        )
    return listing


def list_class_folders(
    folder: Path, class_names: Sequence[str], pool: Executor
) -> tuple[list[ImageFile], list[str]]:
    """List folder/CLASS/*.

    Returns:
      The images, and sentences on what was left out.

    Raises:
      SourceError: a class folder's name is not in ``class_names``.
    """
    paths = subfolders(folder)
    check_classes(folder, [class_name(path.name) for path in paths], class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    listed = pool.map(list_images, map(str, paths))
    bar = tqdm(
        zip(paths, listed, strict=True),
        f"listing {as_text(folder.name)}",
        total=len(paths),
        unit=" classes",
    )
    images: list[ImageFile] = []
    left_out: list[str] = []
    for path, (images_here, others) in bar:
        label = label_of[class_name(path.name)]
        images += [image._replace(label=label) for image in images_here]
        left_out += others
    return images, [*_left_out_beside(folder), *_lines(folder, left_out)]


def list_images(folder: str) -> tuple[list[ImageFile], list[str]]:
    """Return the images in a folder, without labels, and the paths of all else that is in it."""
    images, others = [], []
    for path in sorted(Path(folder).iterdir()):
        if not why_no_image(path):
            images.append(ImageFile(as_text(path.name), -1, str(path), 0, path.stat().st_size))
        else:
            others.append(str(path))
    return images, others


def class_name(folder: str) -> str:
    """Return the name of the class of a folder: one line of text, as TFDS keeps it."""
    return as_text(folder).strip()


def _left_out_beside(folder: Path) -> Iterator[str]:
    """Yield sentences on what is in a folder beside the folders of classes or splits."""
    taken = set(subfolders(folder))
    yield from _lines(folder, [str(path) for path in folder.iterdir() if path not in taken])


def _lines(folder: Path, left_out: Iterable[str]) -> Iterator[str]:
    # What is an image by itself is left out for its place.
    reasons = [(path, why_no_image(Path(path)) or OUTSIDE) for path in left_out]
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
    return "validation" if name in VALIDATION_FOLDERS else name
