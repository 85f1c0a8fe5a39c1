"""Networks to export."""

import pytest
from helpers import exporting, golden

from cotnet_jax.predictor import Predictor
from cotnet_jax.tools import exported_models


@pytest.fixture(scope="session")
def cotnet50() -> exported_models.ExportedModel:
    """Return cotnet50 with the golden's two images, and a third one."""
    file = golden.GOLDENS / "forward" / "cotnet50_224x224.npz"
    return exported_models.build("cotnet50", file, 3)


@pytest.fixture(scope="session")
def tiny() -> Predictor:
    return exporting.small_predictor()
