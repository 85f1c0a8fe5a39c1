"""The golden files of this folder, and the formulas of their inputs."""

from pathlib import Path

from cotnet_jax.tools import goldens
from cotnet_jax.tools.goldens import STATE_DICTS, images, model_of, relative_error, state_dict

__all__ = [
    "GOLDENS",
    "STATE_DICTS",
    "golden_files",
    "images",
    "model_of",
    "relative_error",
    "state_dict",
    "state_dict_shapes",
]

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden_files(kind: str) -> list[Path]:
    return sorted((GOLDENS / kind).glob("*.npz"))


def state_dict_shapes(model: str) -> dict[str, tuple[int, ...]]:
    return goldens.state_dict_shapes(model, GOLDENS / "state_dict")
