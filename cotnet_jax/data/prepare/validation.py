"""A validation split from images that come without one."""

import hashlib

from cotnet_jax.data.prepare.listing import ImageFile, Listing, SourceError


def split_off_validation(listing: Listing, fraction: float) -> None:
    """Move a fraction of each class from the split "train" to a new one, "validation".

    An image's place follows from a hash of its name: it is the same every time. Each class with two
    images or more has some in both splits.

    Args:
      listing: of a folder; changed in place.
      fraction: of the images of each class, above 0 and below 1.

    Raises:
      SourceError: there is no split "train", or a split "validation" already.
    """
    if "train" not in listing.splits or "validation" in listing.splits:
        raise SourceError(
            f"--validation={fraction} takes images from a split 'train' for a new one, "
            f"'validation', but the source has the splits {', '.join(sorted(listing.splits))}; "
            "leave the option out"
        )
    by_class: dict[int, list[ImageFile]] = {}
    for image in listing.splits["train"]:
        by_class.setdefault(image.label, []).append(image)
    train: list[ImageFile] = []
    validation: list[ImageFile] = []
    for images in by_class.values():
        count = _count(len(images), fraction)
        ordered = sorted(images, key=_place)
        validation += ordered[:count]
        train += ordered[count:]
    if not validation:
        raise SourceError(f"--validation={fraction}: no class has two images, one for each split")
    listing.splits = {**listing.splits, "train": train, "validation": validation}


def _count(images: int, fraction: float) -> int:
    return min(max(round(fraction * images), 1), images - 1)


def _place(image: ImageFile) -> tuple[str, str]:
    return hashlib.sha256(image.name.encode()).hexdigest(), image.name
