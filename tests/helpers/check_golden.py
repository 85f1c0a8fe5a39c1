"""Prints, for golden files of the forward or the train kind, each figure's relative error.

    python tests/helpers/check_golden.py tests/goldens/forward/cotnet50_224x224.npz ...

Exits 1 when a figure is above its tolerance. ``--dtype=float32`` checks forward files in float32.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    arguments = parser.parse_args()
    missing = [str(file) for file in arguments.files if not file.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    failures = 0
    for file in arguments.files:
        for figure, error, tolerance in replay.replay(file, arguments.dtype):
            # A NaN is never within its tolerance.
            good = error <= tolerance
            failures += not good
            verdict = "ok" if good else f"ABOVE {tolerance:.0e}"
            print(f"{file.name}  {figure:60s} {error:.2e}  {verdict}", flush=True)
    print(f"{failures} figures above tolerance")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
