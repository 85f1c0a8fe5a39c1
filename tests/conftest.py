"""Set-up that every test shares."""

import os
from pathlib import Path

import quick

# Before anything imports JAX. Several devices are made in processes of their own (processes.py),
# since their number is fixed once JAX has started.
os.environ["JAX_PLATFORMS"] = "cpu"
# With XLA_FLAGS= in the environment all is compiled as users compile it.
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # A network takes a while to compile and is compiled by several tests, workers and
    # processes: three times faster from JAX's own cache, which `make clean` empties.
    if hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden figures; goldens/README.md says how they were made."""
    return Path(__file__).parent / "goldens"
