"""The built-in dataset: scikit-learn's 1,797 handwritten digits as a TFDS dataset, no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository (its test set), as packed with scikit-learn.
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from cotnet_jax import files
from cotnet_jax.data.dataset_folder import open_folder

# Share of each class's images that goes to the split 'test'.
_TEST_SHARE = 0.2


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """8x8 greyscale digits; a fixed 80/20 split of each class into 'train' and 'test'."""

    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS would look for download checksums; there are none, and looking needs
    # importlib_resources, which TFDS does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits, 8x8 greyscale, packed with scikit-learn.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        # Imported here because scikit-learn is needed only to write the dataset.
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = _is_test(digits.target)
        return {
            "train": self._generate_examples(digits, ~is_test),
            "test": self._generate_examples(digits, is_test),
        }

    def _generate_examples(self, digits, selected: np.ndarray):
        for index in np.flatnonzero(selected):
            # The original values are 0..16; 16 becomes 255.
            image = np.minimum(digits.images[index] * 16, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            # TFDS reads from the current position: without this it silently writes an empty image.
            png.seek(0)
            yield int(index), {"image": png, "label": int(digits.target[index])}


def builder(data_dir: str = "") -> tfds.core.DatasetBuilder:
    """Open the digits, after writing them if they are not there yet.

    They are written to a temporary folder, which is then renamed, so that interrupted writers do
    no harm. Concurrent ones wait for each other.

    Args:
      data_dir: folder of the dataset; "" is ``files.cache_dir()``.

    Returns:
      A builder whose splits are 'train' and 'test'.
    """
    root = files.local(data_dir) if data_dir else files.cache_dir()
    final = root / SklearnDigits.name / str(SklearnDigits.VERSION)
    if not _is_written(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = files.FolderLock(
            files.lock_file_beside(final),
            f"another process writes {final}",
            "choose another --config.data.data_dir",
            wait=True,
        )
        with lock:
            if not _is_written(final):
                files.remove_leftovers(final.parent)
                _write(final)
    return open_folder(final)


def _is_written(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists()


def _write(final: Path) -> None:
    logging.info("Writing the digits dataset to %s (first use only).", final)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=files.UNFINISHED))
    try:
        writer = SklearnDigits(data_dir=temporary, file_format="array_record")
        # TFDS would print the temporary folder as the dataset's location.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            writer.download_and_prepare()
        os.rename(writer.data_dir, final)
        files.sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_test(labels: np.ndarray) -> np.ndarray:
    # The streams of RandomState are frozen, so the split is the same with any version of NumPy.
    rng = np.random.RandomState(0)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(_TEST_SHARE * len(members))]] = True
    return is_test
