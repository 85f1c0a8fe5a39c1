"""Command line: `python -m cotnet_jax.data.prepare imagenet|folder --source=... --output=...`."""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from cotnet_jax.data.prepare.command import prepare
from cotnet_jax.data.prepare.dataset import PrepareError
from cotnet_jax.data.prepare.listing import SourceError

_DESCRIPTION = """
imagenet  writes OUTPUT/imagenet2012/5.1.0, as tfds.data_source("imagenet2012", data_dir=OUTPUT)
          expects it. SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar,
          or with train/WNID/*.JPEG and val/ (in class folders or not), or a TFDS copy in TFRecord.
folder    writes OUTPUT from images in SOURCE/CLASS/* or SOURCE/SPLIT/CLASS/*.

Interrupted, the same command goes on where it stopped. On a spinning disk tar files take hours:
images are read in the dataset's order, which is random.
"""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        prepare(
            args.what,
            args.source,
            args.output,
            workers=args.workers,
            check=not args.no_check,
            checksums=not args.no_checksum,
        )
    except (SourceError, PrepareError) as error:
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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.data.prepare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("imagenet", "folder"))
    parser.add_argument("--source", required=True, type=_path, help="where the images are")
    parser.add_argument("--output", required=True, type=_path, help="where to write")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
    )
    parser.add_argument(
        "--no_check", action="store_true", help="do not try whether every image can be decoded"
    )
    parser.add_argument(
        "--no_checksum", action="store_true", help="do not compare the tar files' SHA-256"
    )
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


if __name__ == "__main__":
    sys.exit(main())
