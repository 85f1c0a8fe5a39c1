"""The labels of a whole split: class weights, and an order in which the classes are balanced."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import logging

from cotnet_jax.data.sources import LabelError, Source
from cotnet_jax.data.transforms import DecodeError

_SECONDS_BETWEEN_LINES = 10.0
_READERS = 8
# Records that are read between two looks at the clock.
_CHUNK = 4096
UNREADABLE = -1


def check_label(label: int, source: Source, split: str, record: int) -> int:
    """Return the label, if it is that of a class.

    Raises:
      LabelError: it is not; names split, record and label.
    """
    if not 0 <= label < source.num_classes:
        unlabelled = " (TFDS's mark of an image without a label)" if label == -1 else ""
        raise LabelError(
            f"record {record} of split {split!r} has the label {label}{unlabelled}, but the "
            f"dataset's {source.num_classes} classes are 0 to {source.num_classes - 1}; choose a "
            "labelled split by --config.data.train_split and --config.data.eval_split, or mend "
            "the dataset"
        )
    return label


def read_labels(source: Source, split: str) -> np.ndarray:
    """Return the label of every record, int64 [records], -1 where a record cannot be read.

    Reads all records, without decoding their images, and logs how far it is.

    Raises:
      LabelError: a label is not that of a class.
    """

    def read(record: int) -> int:
        try:
            label = source[record]["label"]
        except DecodeError:
            return UNREADABLE
        return check_label(label, source, split, record)

    labels = np.empty(len(source), np.int64)
    last_line = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(source), _CHUNK):
            records = range(start, min(start + _CHUNK, len(source)))
            labels[start : records.stop] = list(pool.map(read, records))
            if time.monotonic() >= last_line + _SECONDS_BETWEEN_LINES:
                logging.info("reading labels of %s: %d/%d", split, records.stop, len(source))
                last_line = time.monotonic()
    return labels


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return images / (classes * images of the class), float32 [num_classes].

    Over the images their mean is 1. Only classes with images count; the others' weight is 0.
    """
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, weights, 0).astype(np.float32)


class BalancedOrder(grain.MapDataset):
    """Records in an order in which every class comes equally often in an epoch, give or take one.

    Element i is of class i modulo the number of classes; a class goes through all its records, in
    another order each time, before one comes again. It goes on beyond its length, as Grain's
    datasets do when they are repeated.

    Args:
      labels: from ``read_labels``; classes without records, and unreadable records, do not come.
      epoch_size: its length.
      seed: of all orders.
    """

    def __init__(self, labels: np.ndarray, epoch_size: int, seed: int):
        super().__init__()
        self._length = epoch_size
        classes = np.unique(labels[labels >= 0])
        # Grain adds the number of the pass to a seed: neighbouring ones would be alike.
        seeds: Sequence[int] = np.random.SeedSequence(seed).generate_state(len(classes)).tolist()
        self._members = [np.flatnonzero(labels == label) for label in classes]
        self._orders = [
            grain.MapDataset.range(len(members)).shuffle(seed=seed)
            for members, seed in zip(self._members, seeds, strict=True)
        ]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        draw, label = divmod(index, len(self._orders))
        return int(self._members[label][self._orders[label][draw]])
