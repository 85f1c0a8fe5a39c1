"""The work of the command line: from a source of images to a finished dataset with its report."""

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cotnet_jax import files
from cotnet_jax.data import imagenet
from cotnet_jax.data.dataset_folder import DatasetError, open_folder
from cotnet_jax.data.file_names import as_text
from cotnet_jax.data.prepare import dataset, report, shards
from cotnet_jax.data.prepare.changes import find_changes
from cotnet_jax.data.prepare.checksums import compare_checksums
from cotnet_jax.data.prepare.imagenet_listing import count_differences, list_imagenet
from cotnet_jax.data.prepare.listing import SourceError, list_folder
from cotnet_jax.data.prepare.plan import (
    Plan,
    find_tfrecord_copy,
    name_and_version,
    plan_copy,
    plan_images,
)
from cotnet_jax.data.prepare.validation import split_off_validation
from cotnet_jax.data.workers import exit_with_main_process


class _Planned(NamedTuple):
    """A plan, sentences on what is odd about its source, and tar files to check."""

    plan: Plan
    differences: list[str]
    archives: list[Path]


def prepare(
    source_type: str,
    source: Path,
    output: Path,
    *,
    workers: int,
    check: bool,
    checksums: bool,
    validation: float = 0.0,
    layout: str = "",
    short_side: int = 0,
) -> None:
    """Write a dataset and print its report; do nothing if the dataset is there already.

    Args:
      source_type: "imagenet", or "folder" for any other folder of images.
      source: folder with the images.
      output: folder of the dataset; ImageNet is written to output/imagenet2012/5.1.0.
      workers: number of processes.
      check: decode every image to find those that cannot be decoded. A folder's are left out.
      checksums: compare the official tar files with their SHA-256.
      validation: fraction of a folder's images for a split "validation"; 0 makes none.
      layout: as in ``list_folder``.
      short_side: resize images whose short side is longer to this; 0 resizes none.

    Raises:
      SourceError: the source is not as expected.
      PrepareError: the dataset cannot be written to the output, or is there already, but made of
        other images.
      LockedError: another process prepares the same output.
      OSError: from reading or writing; finished files are kept.
      BrokenProcessPool: a worker was killed; finished files are kept.
    """
    if not source.is_dir():
        raise SourceError(f"--source={source}: no such folder")
    if as_text(str(output)) != str(output):
        # ArrayRecord takes no other names.
        raise dataset.PrepareError(
            f"--output={as_text(str(output))}: its name is not UTF-8 text; choose another one"
        )
    if source_type == "folder" and output.resolve().is_relative_to(source.resolve()):
        raise dataset.PrepareError(
            f"--output={output}: is inside the source, where it would be taken for a class; choose "
            f"one outside {source}"
        )
    begun = time.time()
    is_imagenet = source_type == "imagenet"
    folder = output / imagenet.NAME / imagenet.VERSION if is_imagenet else output

    def make_plan(pool: Executor) -> _Planned:
        if is_imagenet:
            return _plan_imagenet(source, folder, pool, short_side=short_side)
        return _plan_folder(
            source,
            folder,
            pool,
            validation=validation,
            layout=layout,
            check=check,
            short_side=short_side,
        )

    if _is_there(folder):
        _refuse_other_size(folder, short_side)
        if not is_imagenet:
            _refuse_changes(make_plan, source)
        print(f"{folder} is already there; nothing to do.")
        return
    if folder.exists() and any(folder.iterdir()):
        raise dataset.PrepareError(
            f"{folder} is not empty and not a prepared dataset; choose another --output"
        )
    busy, advice = f"another process prepares {folder}", "choose another --output"
    with files.FolderLock(files.lock_file_beside(folder), busy, advice):
        if _is_there(folder):
            _refuse_other_size(folder, short_side)
            print(f"{folder} is already there; nothing to do.")
            return
        # Spawned because forking a process that has threads may hang.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            workers, mp_context=spawn, initializer=exit_with_main_process, initargs=(0, 0)
        ) as pool:
            try:
                plan, differences, archives = make_plan(pool)
                results = dataset.write_dataset(plan, pool, check)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if checksums:
            differences += compare_checksums(archives)
        finished = report.make_report(plan, results, source, differences, begun=begun)
        dataset.finish(plan, results, finished)
        report.print_report(finished, folder, imagenet_dir=output if is_imagenet else None)


def _is_there(folder: Path) -> bool:
    """Return whether a folder holds a dataset.

    Raises:
      PrepareError: it does, but a damaged one.
    """
    if not (folder / "dataset_info.json").exists():
        return False
    try:
        open_folder(folder)
    except DatasetError as error:
        raise dataset.PrepareError(str(error)) from None
    return True


def _read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a dataset; {} if it is lost."""
    try:
        return json.loads((folder / report.FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _refuse_other_size(folder: Path, short_side: int) -> None:
    """Raise PrepareError if a dataset's images have another size than is wanted now."""
    report_there = _read_report(folder)
    there = report_there.get("short_side", 0)
    # Whose report is lost, whose size is not known.
    if not report_there or there == short_side:
        return
    same = f"with --size={there}" if there else "without --size"
    raise dataset.PrepareError(
        f"{folder} is already there, prepared {same}: type the same, or choose another --output"
    )


def _refuse_changes(make_plan: Callable[[Executor], "_Planned"], source: Path) -> None:
    """Raise PrepareError if a dataset was made of other images than the source has now."""
    # Listing is all there is to do: threads, which are there at once, are fast enough for it.
    with ThreadPoolExecutor() as pool:
        plan, _, _ = make_plan(pool)
    changes = find_changes(plan, _read_report(plan.output))
    if changes:
        listed = "\n  ".join(changes)
        raise dataset.PrepareError(
            f"{plan.output} is already there, and {source} has changed since:\n  {listed}\n"
            "Choose another --output, or delete that folder and run the command again"
        )


def _plan_imagenet(source: Path, folder: Path, pool: Executor, *, short_side: int) -> _Planned:
    copy = find_tfrecord_copy(source)
    if copy:
        counts = {split: info.num_examples for split, info in copy.info.splits.items()}
        return _Planned(
            plan_copy(copy, folder, short_side=short_side), count_differences(counts), []
        )
    listing = list_imagenet(source, pool)
    plan = plan_images(
        imagenet.NAME,
        imagenet.VERSION,
        folder,
        listing,
        shards.image_features(listing.class_names, jpeg=True),
        plain_jpeg=True,
        # The official set has all of its images, whatever they are.
        leave_out=False,
        short_side=short_side,
    )
    return _Planned(plan, listing.differences, listing.archives)


def _plan_folder(
    source: Path,
    folder: Path,
    pool: Executor,
    *,
    validation: float,
    layout: str,
    check: bool,
    short_side: int,
) -> _Planned:
    listing = list_folder(source, pool, layout)
    if validation:
        split_off_validation(listing, validation)
    plan = plan_images(
        *name_and_version(folder),
        folder,
        listing,
        shards.image_features(listing.class_names, jpeg=False),
        plain_jpeg=False,
        leave_out=check,
        short_side=short_side,
    )
    return _Planned(plan, listing.differences, [])
