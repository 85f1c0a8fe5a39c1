"""``cotnet-prepare``: prepare ImageNet or a folder of images for training."""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from cotnet_jax import command_line
from cotnet_jax.files import LockedError

EXAMPLES = (
    "cotnet-prepare imagenet --source=downloads --output=datasets",
    "cotnet-prepare folder --source=photos --output=prepared",
    "cotnet-prepare folder --source=photos --output=prepared --validation=0.2",
)
NOTES = """
imagenet  writes OUTPUT/imagenet2012/5.1.0, where tfds.data_source("imagenet2012", data_dir=OUTPUT)
          finds it. SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar,
          or with train/WNID/*.JPEG and val/ (in folders of classes or not), or a TFDS copy in
          TFRecord.
folder    writes OUTPUT from the images in SOURCE/CLASS/ or SOURCE/SPLIT/CLASS/ and the folders
          inside. With --validation=0.2 a fifth of each class becomes the split "validation", the
          same images every time. Images that cannot be decoded are left out and listed.

With --size=320 images whose short side is longer than 320 pixels are stored with one of 320, as
JPEG, and read faster. Crops then come from fewer pixels: docs/data.md says what that changes.

After an interruption the same command continues. On a spinning disk tar files take hours, as
images are read in the dataset's order, which is random.
"""


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    command_line.print_any_name()
    # TFDS takes a second to import: wrong options are reported before that.
    from cotnet_jax.data.prepare.command import prepare
    from cotnet_jax.data.prepare.dataset import PrepareError
    from cotnet_jax.data.prepare.listing import SourceError

    try:
        prepare(
            args.what,
            args.source,
            args.output,
            workers=args.workers,
            check=not args.no_check,
            checksums=not args.no_checksum,
            validation=args.validation,
            layout=args.layout or "",
            short_side=args.size or 0,
        )
    except (SourceError, PrepareError, LockedError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"error: {error}\nFinished files are kept; fix the cause and run the command again.",
            file=sys.stderr,
        )
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, most likely because memory ran out. Finished "
            f"files are kept; run the command again with fewer than --workers={args.workers}.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    else:
        return 0
    return 1


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.what != "folder":
        given = [f"--{name}" for name in ("validation", "layout") if getattr(options, name)]
        if given:
            parser.error(f"{' and '.join(given)}: for folder only")
    return options


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(
        "Prepare images for training, as a TFDS dataset.", EXAMPLES, notes=NOTES
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
        "--validation",
        type=_fraction,
        metavar="FRACTION",
        default=0.0,
        help="Of a folder: fraction of each class for the split validation; by default none.",
    )
    parser.add_argument(
        "--layout",
        choices=("classes", "splits"),
        help="Of a folder: what the folders in SOURCE are; by default told by their names.",
    )
    parser.add_argument(
        "--size",
        type=command_line.positive,
        metavar="N",
        help="Pixels of the short side that longer ones are resized to; by default none are.",
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
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, not {text!r}")
    return value


def _path(text: str) -> Path:
    return Path(command_line.path(text))
