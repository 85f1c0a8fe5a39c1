"""Set-up that every test shares."""

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


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the check of annotations off, for tests of the package's own errors for wrong input."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_configure(config: pytest.Config) -> None:
    # A network takes a while to compile and is compiled by several tests, workers and
    # processes: three times faster from JAX's own cache, which `make clean` empties.
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        # What compiles in less than a second, too: every process of a run compiles it again.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# Those of half a minute and more, the longest first; those that mostly wait are between.
LONG_FILES = [
    "test_golden",
    "test_notebook",
    "test_distributed",
    "test_aggregation_triton",
    "test_train",
    "test_faults",
    "test_models",
    "test_step",
    "test_convert",
    "test_aggregation_large",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes longest: begun last, it would keep one worker while the others have ended.
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden figures; goldens/README.md says how they were made."""
    return Path(__file__).parent / "goldens"
