"""Compile Triton kernels in a process of their own, because the tests' own one interprets them."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def lower_alone(script: str, cache: pathlib.Path, *arguments: str) -> list[str]:
    """Run a Python script that compiles kernels; return the lines that it prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()
