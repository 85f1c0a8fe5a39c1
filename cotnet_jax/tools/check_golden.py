"""Compare logits, features and training steps with those of the PyTorch original.

    python -m cotnet_jax.tools.check_golden tests/goldens/forward/cotnet50_224x224.npz
    python -m cotnet_jax.tools.check_golden --dtype=float32 tests/goldens/forward/*
    python -m cotnet_jax.tools.check_golden tests/goldens/train/*

Prints the relative L2 error of each reference value in the files. Exits with 1 if any is above its
tolerance.
"""

import argparse
import sys
from pathlib import Path

from cotnet_jax.tools.golden_replay import replay


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.check_golden",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="of tests/goldens/forward or tests/goldens/train",
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="of weights and activations in forward files; training is always in float64",
    )
    arguments = parser.parse_args()
    missing = [str(file) for file in arguments.files if not file.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    failures = 0
    for file in arguments.files:
        for name, error, tolerance in replay(file, arguments.dtype):
            # A NaN is never within its tolerance.
            good = error <= tolerance
            failures += not good
            verdict = "ok" if good else f"ABOVE {tolerance:.0e}"
            print(f"{file.name}  {name:60s} {error:.2e}  {verdict}", flush=True)
    print(f"{failures} errors above tolerance")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
