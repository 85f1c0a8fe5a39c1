"""Whether the images that a dataset was prepared from are still the same."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cotnet_jax.data.dataset_folder import open_folder
from cotnet_jax.data.file_names import as_class_name
from cotnet_jax.data.prepare.listing import ImageFile
from cotnet_jax.data.prepare.plan import Plan
from cotnet_jax.data.prepare.shards import Stored, convert
from cotnet_jax.data.sources import TfdsSource
from cotnet_jax.data.transforms import DecodeError

_MAX_NAMED = 3


def find_changes(plan: Plan, report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of difference between a source and the dataset made of it.

    Names, labels and sizes are compared, and the bytes if these differ or a file is newer than the
    dataset.

    Args:
      plan: what would be written to ``plan.output`` now, which holds a dataset.
      report: from ``report.make_report``; {} if it is lost.
    """
    images = [image for shard in plan.shards for image in shard.images]
    same = report.get("fingerprint") == plan.fingerprint
    if same and max(map(_changed_at, images)) < report["begun"]:
        return []
    return [
        f"{what}: {len(names):,} images, the first {', '.join(sorted(names)[:_MAX_NAMED])}"
        for what, names in _compare(plan, report).items()
        if names
    ]


def _changed_at(image: ImageFile) -> float:
    """Return when a file was written, renamed or put here, in seconds since 1970."""
    status = Path(image.file).stat()
    return max(status.st_mtime, status.st_ctime)


def _compare(plan: Plan, report: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return {what happened: names of images}, reading the whole dataset."""
    wanted = {(shard.split, image.name): image for shard in plan.shards for image in shard.images}
    left_out = {
        (split, name)
        for split, found in report.get("splits", {}).items()
        for name, _ in found.get("left_out", [])
    }
    classes = plan.features["label"].names
    builder = open_folder(plan.output)
    there, changed = set(left_out), set()
    with tqdm(desc="comparing", total=len(wanted), unit=" images") as bar:
        for split in builder.info.splits:
            source = TfdsSource(builder, split)
            for record in range(len(source)):
                bar.update()
                try:
                    element = source[record]
                except DecodeError:
                    # What it held is among the new ones then.
                    continue
                key = split, element["file_name"]
                there.add(key)
                image = wanted.get(key)
                if image and (
                    as_class_name(source.class_names[element["label"]]) != classes[image.label]
                    or element["image"] != _stored(image, plan)
                ):
                    changed.add(key)
    for key in left_out & wanted.keys():
        if not _convert(wanted[key], plan, check=True).error:
            changed.add(key)
    new, gone = _names(wanted.keys() - there), _names(there - wanted.keys())
    moved = new & gone
    return {
        "new": new - moved,
        "gone": gone - moved,
        "changed": _names(changed),
        "in another split": moved,
    }


def _stored(image: ImageFile, plan: Plan) -> bytes:
    return _convert(image, plan, check=False).data


def _convert(image: ImageFile, plan: Plan, *, check: bool) -> Stored:
    return convert(Path(image.file).read_bytes(), False, check, plan.short_side)


def _names(keys: Iterable[tuple[str, str]]) -> set[str]:
    return {name for _, name in keys}
