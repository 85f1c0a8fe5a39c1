"""Set-up that every test shares."""

import collections
import json
import os
from pathlib import Path

from helpers import quick

# Before anything imports JAX. Several devices are made in processes of their own
# (helpers/processes.py), since their number is fixed once JAX has started.
os.environ["JAX_PLATFORMS"] = "cpu"
# With XLA_FLAGS= in the environment all is compiled as users compile it.
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)

import jaxtyping
import pytest

# Checks the shapes in annotations whenever a test calls these modules. Not in the Triton kernels:
# Triton compiles their sources itself.
jaxtyping.install_import_hook(
    [
        "cotnet_jax.layers",
        "cotnet_jax.models",
        "cotnet_jax.ops.local_aggregation.normalized",
        "cotnet_jax.ops.local_aggregation.plain",
    ],
    "beartype.beartype",
)

# Seconds that each test file took when last recorded, by its path from here.
DURATIONS = Path(__file__).parent / "durations.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-durations",
        action="store_true",
        help=f"write the seconds of each test file to tests/{DURATIONS.name}",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A network takes a while to compile and is compiled by several tests, workers and
    # processes: three times faster from JAX's own cache, which `make clean` empties.
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        # What compiles in less than a second, too: every process of a run compiles it again.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # xdist's controller sees the reports of all workers.
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_DurationRecorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.iter_markers("kernels")) and not any(item.iter_markers("end_to_end")):
            item.add_marker(pytest.mark.unit)
    # The longest files first: begun last, one would keep a worker while the others have ended.
    seconds = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(_file_of(item.nodeid), 0))


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


class _DurationRecorder:
    """Adds up each file's seconds, and writes them when the session ends."""

    def __init__(self):
        self._seconds = collections.Counter(json.loads(DURATIONS.read_text()))
        self._seen: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = _file_of(report.nodeid)
        if file not in self._seen:
            self._seen.add(file)
            self._seconds[file] = 0
        self._seconds[file] += report.duration

    def pytest_sessionfinish(self) -> None:
        folder = DURATIONS.parent
        seconds = {
            file: round(value)
            for file, value in sorted(self._seconds.items())
            if (folder / file).exists() and value >= 1
        }
        DURATIONS.write_text(json.dumps(seconds, indent=1) + "\n")


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the check of annotations off, for tests of the package's own errors for wrong input."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder of the reference's values; goldens/README.md says how they were made."""
    return Path(__file__).parent / "goldens"
