"""Builds .h5 files in the layout of Keras 2, for tests of their reader."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights by formula, float32: "LAYER/PATH:0" -> array, of these shapes."""
    return {name: _array(name, tuple(shape)) for name, shape in shapes.items()}


def _array(name, shape):
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(("/gamma:0", "/moving_variance:0")):
        value = random.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * random.standard_normal(shape)
    else:
        value = random.standard_normal(shape) * np.sqrt(1 / np.prod(shape[:-1]))
    return value.astype(np.float32)


def images() -> np.ndarray:
    """The images of the golden logits, float32 [3, 32, 32, 3]."""
    return np.random.RandomState(0).standard_normal((3, 32, 32, 3)).astype(np.float32)


def write(
    path: Path, arrays: Mapping[str, np.ndarray], *, whole: bool = False, chunks: int = 0
) -> Path:
    """Write what ``model.save_weights``, or for a ``whole`` model ``model.save``, writes.

    Args:
      arrays: "LAYER/PATH:0" -> array; PATH begins with the layer's name once more.
      whole: put them into the group "model_weights".
      chunks: spread "layer_names" over so many attributes, as Keras does with long lists.
    """
    # Tests without .h5 files run where h5py is not installed.
    import h5py

    layers: dict[str, dict[str, np.ndarray]] = {"input_1": {}}
    for name, array in arrays.items():
        layer, _, inside = name.partition("/")
        layers.setdefault(layer, {})[inside] = array
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole else file
        root.attrs["backend"], root.attrs["keras_version"] = b"tensorflow", b"2.15.0"
        names = np.array([layer.encode() for layer in layers])
        for index, part in enumerate(np.array_split(names, chunks or 1)):
            root.attrs[f"layer_names{index}" if chunks else "layer_names"] = part
        for layer, inside in layers.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in inside]
            for name, array in inside.items():
                group.create_dataset(name, data=array)
        root.create_group("top_level_model_weights").attrs["weight_names"] = []
    return path
