"""The reference implementation's figures, and the weights and images they belong to."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens"
# Two variants share their state dict; -200 and -270 have no goldens.
STATE_DICTS = {"se_cotnetd_152_L": "se_cotnetd_152"}


def golden_files(kind: str) -> list[Path]:
    return sorted((GOLDENS / kind).glob("*.npz"))


def model_of(path: Path) -> str:
    """The model's name: FILE is MODEL.npz or MODEL_HxW.npz."""
    return re.sub(r"_\d+x\d+$", "", path.stem)


def state_dict_shapes(model: str) -> dict[str, tuple[int, ...]]:
    file = GOLDENS / "state_dict" / f"{STATE_DICTS.get(model, model)}.json"
    return {name: tuple(shape) for name, shape in json.loads(file.read_text()).items()}


def state_dict(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights by the formula of goldens/README.md."""
    return {name: _tensor(name, shape, seed) for name, shape in shapes.items()}


def _tensor(name, shape, seed):
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0xFFFFFFFF)
    if name.endswith("num_batches_tracked"):
        return np.asarray(1000, np.int64)
    if name.endswith("running_var"):
        value = random.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean") or name.endswith("bias"):
        value = 0.1 * random.standard_normal(shape)
    elif len(shape) == 1:
        last = re.search(r"layer\d+\.\d+\.bn3\.weight$", name)
        value = random.uniform(0.05, 0.15, shape) if last else random.uniform(0.5, 1.5, shape)
    else:
        value = random.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    return np.asarray(value, np.float32)


def images(seed: int, shape) -> np.ndarray:
    """Images by the formula of goldens/README.md, NCHW ``shape`` -> NHWC float32."""
    images = np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


def relative_error(value, expected) -> float:
    """||value - expected|| / ||expected||, in float64."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
