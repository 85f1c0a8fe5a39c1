"""The work of the command line: from a source of images to a finished dataset with its report."""

import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from cotnet_jax import files
from cotnet_jax.data import imagenet
from cotnet_jax.data.dataset_folder import DatasetError, open_folder
from cotnet_jax.data.file_names import as_text
from cotnet_jax.data.prepare import dataset, report, shards
from cotnet_jax.data.prepare.checksums import compare_checksums
from cotnet_jax.data.prepare.imagenet_listing import count_differences, list_imagenet
from cotnet_jax.data.prepare.listing import Listing, SourceError, list_folder
from cotnet_jax.data.prepare.plan import (
    Plan,
    find_tfrecord_copy,
    name_and_version,
    plan_copy,
    plan_images,
)
from cotnet_jax.data.workers import exit_with_main_process


def prepare(
    source_type: str, source: Path, output: Path, *, workers: int, check: bool, checksums: bool
) -> None:
    """Write a dataset and print its report; do nothing if the dataset is there already.

    Args:
      source_type: "imagenet", or "folder" for any other folder of images.
      source: folder with the images.
      output: folder of the dataset; ImageNet is written to output/imagenet2012/5.1.0.
      workers: number of processes.
      check: decode every image to find those that cannot be decoded.
      checksums: compare the official tar files with their SHA-256.

    Raises:
      SourceError: the source is not as expected.
      PrepareError: the dataset cannot be written to the output.
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
    is_imagenet = source_type == "imagenet"
    folder = output / imagenet.NAME / imagenet.VERSION if is_imagenet else output
    if (folder / "dataset_info.json").exists():
        try:
            open_folder(folder)
        except DatasetError as error:
            raise dataset.PrepareError(str(error)) from None
        print(f"{folder} is already there; nothing to do.")
        return
    if folder.exists() and any(folder.iterdir()):
        raise dataset.PrepareError(
            f"{folder} is not empty and not a prepared dataset; choose another --output"
        )
    busy, advice = f"another process prepares {folder}", "choose another --output"
    with files.FolderLock(files.lock_file_beside(folder), busy, advice):
        _prepare(is_imagenet, source, output, folder, workers, check, checksums)


def _prepare(is_imagenet, source, output, folder, workers, check, checksums) -> None:
    """Do what ``prepare`` does, in a folder that this process has for itself."""
    if (folder / "dataset_info.json").exists():
        print(f"{folder} is already there; nothing to do.")
        return
    # Spawned because forking a process that has threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=exit_with_main_process, initargs=(0, 0)
    ) as pool:
        try:
            if is_imagenet:
                plan, differences, archives = _plan_imagenet(source, folder, pool)
            else:
                plan, differences, archives = _plan_folder(source, folder, pool)
            results = dataset.write_dataset(plan, pool, check)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if checksums:
        differences += compare_checksums(archives)
    finished = report.make_report(plan, results, source, differences)
    dataset.finish(plan, results, finished)
    report.print_report(finished, folder, imagenet_dir=output if is_imagenet else None)


def _plan_imagenet(
    source: Path, folder: Path, pool: Executor
) -> tuple[Plan, list[str], list[Path]]:
    """Return the plan, the differences from the official set, and the tar files to check."""
    copy = find_tfrecord_copy(source)
    if copy:
        counts = {split: info.num_examples for split, info in copy.info.splits.items()}
        return plan_copy(copy, folder), count_differences(counts), []
    listing = list_imagenet(source, pool)
    plan = _plan(listing, imagenet.NAME, imagenet.VERSION, folder, jpeg=True)
    return plan, listing.differences, listing.archives


def _plan_folder(source: Path, folder: Path, pool: Executor) -> tuple[Plan, list[str], list[Path]]:
    listing = list_folder(source, pool)
    name, version = name_and_version(folder)
    return _plan(listing, name, version, folder, jpeg=False), listing.differences, []


def _plan(listing: Listing, name: str, version: str, folder: Path, jpeg: bool) -> Plan:
    features = shards.image_features(listing.class_names, jpeg)
    return plan_images(name, version, folder, listing, features, plain_jpeg=jpeg)
