"""Read the arrays of a Keras 2 file of weights, HDF5, without Keras.

A file of ``model.save_weights("x.h5")`` has a group for each layer, in which the arrays lie, at
times below more groups: "stem_conv/stem_conv/kernel:0". One of ``model.save("x.h5")`` has the same
in its group "model_weights". HDF5 runs nothing of a file, but a file can lead to other files and
claim any size: what is read is checked before. Attributes are not read. Those that list the names
(``layer_names``, ``weight_names``) are the groups' own names once more and could be one long text
many times, and HDF5 has been seen to read a damaged one for ever.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files.budget import LIMITS, Limits
from cotnet_jax.weights.torch_files.inert import printable

FORMAT = "Keras HDF5"
_MAGIC = b"\x89HDF\r\n\x1a\n"
# Groups in a layer's group; nested models make more than one.
_MOST_LEVELS = 8
# The largest model of kecam has 5,000, of which 1,500 are arrays; comparing those of wrong files
# takes quadratic time.
_MOST_NAMES = 20_000


def is_hdf5(path: str | os.PathLike) -> bool:
    """Return whether a path is a file that begins as HDF5 does."""
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_keras_file(path: str | os.PathLike, limits: Limits = LIMITS) -> dict[str, np.ndarray]:
    """Read all weights of a Keras 2 file.

    Args:
      path: the .h5 file.
      limits: ``name_length``, ``dimensions`` and ``array_*`` bound what it may hold.

    Returns:
      "LAYER/WEIGHT", such as "stem_conv/kernel" -> array of a floating dtype.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      WeightsError: h5py is not installed; or the file is damaged, is none of Keras 2, leads to
        other files, is compressed, or exceeds the limits.
    """
    try:
        import h5py
    except ImportError:
        raise WeightsError(
            f'{path}: HDF5 files need h5py, which is not installed: type pip install "h5py" (or '
            'install cotnet_jax with its extra, "cotnet_jax[h5]")'
        ) from None
    # Errors of the operating system are raised as such; HDF5's, which come as OSError too, are not.
    with open(path, "rb") as opened:
        try:
            with h5py.File(opened, "r") as file:
                return _Reader(h5py, file, os.fstat(opened.fileno()).st_size, limits).read()
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None
        except Exception as error:
            what = printable(f"{type(error).__name__}: {error}")
            raise WeightsError(f"{path}: damaged ({what}); get the file again") from None


class _Reader:
    """Reads one open file."""

    def __init__(self, h5py, file, size: int, limits: Limits):
        self._h5py, self._file, self._limits = h5py, file, limits
        self._opened = 0
        self._bytes_left = limits.array_bytes + limits.array_factor * size

    def read(self) -> dict[str, np.ndarray]:
        root = self._file
        if "model_weights" in root:
            root = self._open(root, "model_weights", "model_weights")
        if not isinstance(root, self._h5py.Group) or not (
            # Long lists are spread over several attributes.
            "layer_names" in root.attrs or "layer_names0" in root.attrs
        ):
            raise WeightsError(self._what_else())
        arrays: dict[str, np.ndarray] = {}
        for layer in root:
            group = self._open(root, layer, layer)
            for weight, dataset in self._datasets(group, layer):
                name = f"{layer}/{weight.removesuffix(':0')}"
                if name in arrays:
                    raise WeightsError(f"has {printable(name)} twice")
                arrays[name] = self._array(dataset, name)
        return arrays

    def _datasets(self, group, path: str) -> Iterator[tuple[str, Any]]:
        """Yield (last part of the path, dataset) of all below a group."""
        if not isinstance(group, self._h5py.Group):
            raise WeightsError(f"{printable(path)} is no group of a layer")
        if path.count("/") == _MOST_LEVELS:
            raise WeightsError(f"{printable(path)} lies too deep")
        for name in group:
            found = self._open(group, name, f"{path}/{name}")
            if isinstance(found, self._h5py.Dataset):
                yield name, found
            else:
                yield from self._datasets(found, f"{path}/{name}")

    def _open(self, group, name: str, path: str) -> Any:
        """Return what a name in a group is, if it is in the file itself."""
        self._opened += 1
        if self._opened > _MOST_NAMES:
            raise WeightsError(f"has more than {_MOST_NAMES:,} groups and arrays")
        if len(name) > self._limits.name_length:
            raise WeightsError(f"a name of {len(name):,} characters")
        if not isinstance(group.get(name, getlink=True), self._h5py.HardLink):
            raise WeightsError(f"{printable(path)} is a link to elsewhere, as no weights are")
        return group[name]

    def _array(self, dataset, name: str) -> np.ndarray:
        shown = printable(name)
        plan = dataset.id.get_create_plist()
        if dataset.is_virtual or plan.get_external_count():
            raise WeightsError(f"the values of {shown} are in another file, as no weights are")
        # Keras compresses nothing, and what is compressed can inflate to any size.
        if plan.get_nfilters():
            raise WeightsError(
                f"{shown} is compressed: write the file again by `h5repack -f NONE FILE NEW`"
            )
        if dataset.dtype.kind != "f":
            raise WeightsError(f"{shown} is {dataset.dtype}, which is not a floating-point type")
        if dataset.shape is None or len(dataset.shape) > self._limits.dimensions:
            raise WeightsError(f"{shown} has the shape {dataset.shape}")
        self._bytes_left -= int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
        if self._bytes_left < 0:
            raise WeightsError(
                f"its arrays, up to {shown}, claim more bytes than weights in a file of its size"
            )
        return np.asarray(dataset[()])

    def _what_else(self) -> str:
        if "_layer_checkpoint_dependencies" in self._file or "layers" in self._file:
            return (
                "weights as Keras 3 writes them, without the names of layers: load them into the "
                "model in Keras, and write a .h5 file by Keras 2, model.save_weights('x.h5')"
            )
        return "an HDF5 file, but none of Keras's weights (it has no layer_names)"
