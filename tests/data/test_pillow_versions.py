"""Images are the same on the oldest Pillow allowed; the tests themselves run on the newest."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.end_to_end

TESTS = Path(__file__).parents[1]
# They compare with the goldens and with Pillow's own resizing, pixel by pixel.
COMPARISONS = ["data/test_transforms.py", "data/test_randaugment.py"]


def oldest_pillow() -> str:
    """The lower bound in requirements.txt."""
    lines = (TESTS.parent / "requirements.txt").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("pillow"))
    (version,) = (s.version for s in Requirement(line).specifier if s.operator == ">=")
    return version


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.fixture
def folder_of_oldest(tmp_path) -> Path:
    """A folder with nothing but that Pillow, for PYTHONPATH."""
    oldest = oldest_pillow()
    if Version(importlib.metadata.version("pillow")) == Version(oldest):
        pytest.skip(f"Pillow {oldest} is the installed one, which all tests use")
    installed = run(
        *("pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"),
        *("--only-binary=:all:", "--timeout=20", "--retries=1"),
        *("--target", tmp_path, f"pillow=={oldest}"),
    )
    if installed.returncode:
        reason = f"pip cannot install Pillow {oldest}: {installed.stderr[-300:]}"
        # Where nobody reads the reasons of skipped tests, it must not go unnoticed.
        (pytest.fail if os.environ.get("GITHUB_ACTIONS") else pytest.skip)(reason)
    return tmp_path


def test_images_on_the_oldest_pillow(folder_of_oldest):
    path = os.pathsep.join([str(folder_of_oldest), str(TESTS.parent), str(TESTS)])
    found = run("PIL", PYTHONPATH=path).stdout
    assert f"Pillow {oldest_pillow()}" in found
    assert str(folder_of_oldest) in found
    result = run(
        *("pytest", "--quiet", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *(TESTS / name for name in COMPARISONS),
        PYTHONPATH=path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
