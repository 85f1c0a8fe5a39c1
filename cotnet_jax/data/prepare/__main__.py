"""Prepare a dataset: ``python -m cotnet_jax.data.prepare WHAT --source=DIR --output=DIR``."""

import argparse
import hashlib
import multiprocessing
import os
import re
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from cotnet_jax import command_line
from cotnet_jax.data.prepare import dataset, listing, shards

_IMAGENET = "imagenet2012"
_IMAGENET_VERSION = "5.1.0"
_EXAMPLES = (
    "python -m cotnet_jax.data.prepare imagenet --source=downloads --output=tensorflow_datasets",
    "python -m cotnet_jax.data.prepare folder --source=photos --output=prepared/photos",
    "python -m cotnet_jax.data.prepare folder --source=photos --output=prepared/photos --workers=4",
)
_NOTES = """
imagenet  writes OUTPUT/imagenet2012/5.1.0, where tfds.data_source("imagenet2012", data_dir=OUTPUT)
          finds it. SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar,
          or with train/WNID/*.JPEG and val/ (in folders of classes or not), or a TFDS copy in
          TFRecord.
folder    writes OUTPUT from the images in SOURCE/CLASS/* or SOURCE/SPLIT/CLASS/*.

After an interruption the same command continues. On a spinning disk tar files take hours, as
images are read in the dataset's order, which is random.
"""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        _prepare(args)
    except (listing.SourceError, dataset.PrepareError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"error: {error}\nFinished files are kept; remove the cause and run the command again.",
            file=sys.stderr,
        )
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, most likely for want of memory. Finished files "
            f"are kept; run the command again with fewer than --workers={args.workers}.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    else:
        return 0
    return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        "Prepare images for training, as a TFDS dataset.", _EXAMPLES, notes=_NOTES
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("imagenet", "folder"),
        required=True,
        help="The kind of dataset, described below.",
    )
    parser.add_argument(
        "--source", type=_path, metavar="DIR", required=True, help="Folder of the images."
    )
    parser.add_argument(
        "--output", type=_path, metavar="DIR", required=True, help="Folder to write to."
    )
    parser.add_argument(
        "--workers",
        type=command_line.positive,
        metavar="N",
        default=os.cpu_count(),
        help="Processes; by default one for each core.",
    )
    parser.add_argument(
        "--no_check", action="store_true", help="Do not check that every image can be decoded."
    )
    parser.add_argument(
        "--no_checksum", action="store_true", help="Do not compare the tar files' SHA-256."
    )
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _prepare(args: argparse.Namespace):
    if not args.source.is_dir():
        raise listing.SourceError(f"--source={args.source}: there is no such folder")
    imagenet = args.what == "imagenet"
    output = args.output / _IMAGENET / _IMAGENET_VERSION if imagenet else args.output
    if (output / "dataset_info.json").exists():
        print(f"{output} is already there; nothing to do.")
        return
    if output.exists() and any(output.iterdir()):
        raise dataset.PrepareError(f"{output} is not empty and no prepared dataset; choose another")
    # Spawned, as forking a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        try:
            plan, differences, archives = _plan(args, output, pool)
            written = dataset.write_dataset(plan, pool, check=not args.no_check)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not args.no_checksum:
        differences += _compare_checksums(archives)
    report = _report(plan, written, args.source, differences)
    dataset.finish(plan, written, report)
    _print_report(report, plan, imagenet, args)


def _plan(
    args: argparse.Namespace, output: Path, pool: Executor
) -> tuple[dataset.Plan, list[str], list[Path]]:
    copy = _tfrecord_copy(args.source) if args.what == "imagenet" else None
    if copy:
        return dataset.plan_copy(copy, output), _count_differences(copy), []
    if args.what == "imagenet":
        found = listing.list_imagenet(args.source, pool)
        name, version = _IMAGENET, _IMAGENET_VERSION
    else:
        found = listing.list_folder(args.source, pool)
        name, version = _dataset_name(output)
    features = shards.image_features(found.class_names, jpeg=args.what == "imagenet")
    plan = dataset.plan_images(
        name, version, output, found, features, plain_jpeg=args.what == "imagenet"
    )
    return plan, found.differences, found.archives


def _tfrecord_copy(source: Path) -> tfds.core.DatasetBuilder | None:
    """The TFDS copy of ImageNet in or under a folder, if there is one."""
    patterns = ("", "5.*/", f"{_IMAGENET}/5.*/")
    found = [path for pattern in patterns for path in source.glob(f"{pattern}dataset_info.json")]
    if not found:
        return None
    builder = tfds.builder_from_directory(sorted(found)[-1].parent)
    file_format = builder.info.file_format.value
    if (builder.name, file_format) != (_IMAGENET, "tfrecord"):
        raise listing.SourceError(
            f"{builder.data_dir} is {builder.name} in the {file_format} format; expected "
            f"{_IMAGENET} as tfrecord"
        )
    return builder


def _count_differences(copy: tfds.core.DatasetBuilder) -> list[str]:
    counts = {split: info.num_examples for split, info in copy.info.splits.items()}
    return [
        f"{split}: {counts.get(split, 0):,} images, the official set has {expected:,}"
        for split, expected in listing.OFFICIAL_COUNTS.items()
        if counts.get(split, 0) != expected
    ]


def _dataset_name(output: Path) -> tuple[str, str]:
    """TFDS name and version for a folder: .../NAME, or .../NAME/VERSION."""
    if tfds.core.Version.is_valid(output.name):
        return _dataset_name(output.parent)[0], output.name
    name = re.sub(r"\W+", "_", output.name.lower()).strip("_")
    return (name if name[:1].isalpha() else f"images_{name}"), "1.0.0"


def _compare_checksums(archives: list[Path]) -> list[str]:
    official = listing.official_checksums()
    differences = []
    for path in archives:
        expected_size, expected = official[path.name]
        size = path.stat().st_size
        if size != expected_size:
            differences.append(f"{path.name}: {size:,} bytes, the official file {expected_size:,}")
        elif (found := _sha256(path)) != expected:
            differences.append(f"{path.name}: SHA-256 {found}, the official file's is {expected}")
    return differences


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    bar = tqdm(
        desc=f"checksum of {path.name}",
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
    )
    with bar, open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _report(
    plan: dataset.Plan,
    written: dict[shards.Shard, shards.Written],
    source: Path,
    differences: list[str],
) -> dict:
    splits: dict[str, dict] = {}
    for shard, result in written.items():
        split = splits.setdefault(
            shard.split,
            {"images": 0, "bytes": 0, "shards": 0, "reencoded": [], "undecodable": []},
        )
        split["images"] += shard.length
        split["bytes"] += result.num_bytes
        split["shards"] += 1
        split["reencoded"] = sorted([*split["reencoded"], *result.reencoded])
        split["undecodable"] += [list(entry) for entry in result.undecodable]
    return {
        "dataset": f"{plan.name}/{plan.version}",
        "source": str(source),
        "classes": plan.features["label"].num_classes,
        "splits": splits,
        "differences": differences,
    }


def _print_report(report: dict, plan: dataset.Plan, imagenet: bool, args: argparse.Namespace):
    print(f"\n{report['dataset']}, {report['classes']} classes, in {plan.output}")
    for name, split in report["splits"].items():
        print(
            f"  {name}: {split['images']:,} images, {split['bytes'] / 1e9:.2f} GB in "
            f"{split['shards']} files; {len(split['reencoded'])} turned into RGB JPEG, "
            f"{len(split['undecodable'])} undecodable"
        )
        for index, file_name, why in split["undecodable"][:10]:
            print(f"    {name}[{index}] {file_name}: {why}")
    for difference in report["differences"]:
        print(f"  DIFFERS: {difference}")
    print(f"Everything about this is in {plan.output / dataset.REPORT}")
    where = (
        f"--config.data.data_dir={args.output}" if imagenet else f"--config.data.name={plan.output}"
    )
    splits = list(report["splits"])
    if imagenet or {"train", "validation"} <= set(splits):
        chosen = ""
    elif len(splits) == 1:
        chosen = (
            f" --config.data.train_split='{splits[0]}[:90%]'"
            f" --config.data.eval_split='{splits[0]}[90%:]'"
        )
    else:
        chosen = " --config.data.train_split=SPLIT --config.data.eval_split=SPLIT"
    print(
        f"Train on it:\n  python main.py --config=configs/cotnet50.py --workdir=DIR {where}{chosen}"
    )


if __name__ == "__main__":
    sys.exit(main())
