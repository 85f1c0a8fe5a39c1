"""The inputs of the goldens, the outputs of the PyTorch original on weights and images by formula.

tests/goldens/README.md defines the formulas and the files.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

# Two variants have the same state dict; se_cotnetd_200 and _270 have no goldens.
STATE_DICTS = {"se_cotnetd_152_L": "se_cotnetd_152"}


def model_of(path: Path) -> str:
    """Return the model's name of a file MODEL.npz or MODEL_HxW.npz."""
    return re.sub(r"_\d+x\d+$", "", path.stem)


def state_dict_shapes(model: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Read PyTorch's {tensor name: shape} of a model from ``folder``, tests/goldens/state_dict."""
    file = folder / f"{STATE_DICTS.get(model, model)}.json"
    return {name: tuple(shape) for name, shape in json.loads(file.read_text()).items()}


def state_dict(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return the weights of a seed: float32, with PyTorch's names, shapes and layouts."""
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


def images(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Return a seed's images, float32 [N, H, W, channels]; ``shape`` is [N, channels, H, W]."""
    images = np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


def relative_error(value: ArrayLike, expected: ArrayLike) -> float:
    """Return ||value - expected|| / ||expected||, L2 norms in float64."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
