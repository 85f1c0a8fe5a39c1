"""The embedded default: scikit-learn's 1,797 handwritten digits as a TFDS dataset, no download.

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

_TEST_SHARE = 0.2


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """8x8 greyscale digits, split 80/20 inside each class; the split never changes."""

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
        # scikit-learn is needed only here, where the dataset is written.
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = _is_test(digits.target)
        return {
            "train": self._generate_examples(digits, ~is_test),
            "test": self._generate_examples(digits, is_test),
        }

    def _generate_examples(self, digits, chosen: np.ndarray):
        for index in np.flatnonzero(chosen):
            # Ink is counted 0..16; 16 becomes 255.
            image = np.minimum(digits.images[index] * 16, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            # At position 0, or TFDS writes an empty image without a word.
            png.seek(0)
            yield int(index), {"image": png, "label": int(digits.target[index])}


def builder(data_dir: str = "") -> tfds.core.DatasetBuilder:
    """The digits, written on the first call and only opened on later ones.

    Written beside its place and then moved there in one go, so that an interrupted or a second,
    simultaneous writer does no harm.

    Args:
      data_dir: folder to keep it in; "" is cotnet_jax in the user's cache folder.

    Returns:
      A builder whose splits are 'train' and 'test'.
    """
    root = Path(data_dir).expanduser() if data_dir else cache_dir()
    final = root / SklearnDigits.name / str(SklearnDigits.VERSION)
    if not (final / "dataset_info.json").exists():
        logging.info("Writing the digits to %s, once.", final)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=".writing-"))
        try:
            writing = SklearnDigits(data_dir=temporary, file_format="array_record")
            # TFDS would announce the temporary folder as the place to find the data.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                writing.download_and_prepare()
            try:
                os.rename(writing.data_dir, final)
            except OSError:
                # Another process was first; it has written the same.
                if not (final / "dataset_info.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tfds.builder_from_directory(final)


def cache_dir() -> Path:
    """cotnet_jax's folder in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cotnet_jax"


def _is_test(labels: np.ndarray) -> np.ndarray:
    # RandomState's streams are frozen, so the split is the same with every NumPy.
    rng = np.random.RandomState(0)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(_TEST_SHARE * len(members))]] = True
    return chosen
