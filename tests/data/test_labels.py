"""Labels of a whole split: class weights, and an order in which the classes are balanced."""

import pickle

import numpy as np
import pytest

from cotnet_jax.data.labels import BalancedOrder, balanced_weights, read_labels
from cotnet_jax.data.sources import LabelError
from cotnet_jax.data.transforms import DecodeError

# Classes of 50, 7, 3, none and 1 records; two records cannot be read.
LABELS = np.array([0] * 50 + [-1] + [1] * 7 + [2] * 3 + [-1] + [4])


class Labelled:
    """A source of which only the labels matter."""

    num_classes = 5

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.labels[index] == -1:
            raise DecodeError("damaged")
        return {"label": int(self.labels[index])}


def test_labels_are_read_in_order():
    labels = np.random.default_rng(0).integers(-1, 5, 5000)
    np.testing.assert_array_equal(read_labels(Labelled(labels), "train"), labels)


def test_a_label_of_no_class_is_named():
    with pytest.raises(LabelError, match="record 7 of split 'train' has the label 5, but"):
        read_labels(Labelled([0] * 7 + [5]), "train")


def test_weights_are_inverse_to_the_number_of_images():
    weights = balanced_weights(LABELS, 5)
    np.testing.assert_allclose(weights * [50, 7, 3, 0, 1], [61 / 4] * 3 + [0, 61 / 4], rtol=1e-6)
    assert weights[LABELS[LABELS >= 0]].mean() == pytest.approx(1)


def test_every_class_comes_equally_often_and_all_its_images_do():
    size = 30
    order = BalancedOrder(LABELS, size, seed=5).shuffle(seed=7)[:size].repeat()
    # Workers get it by pickling.
    again = pickle.loads(pickle.dumps(order))
    records = np.array([order[index] for index in range(size * 8)])
    np.testing.assert_array_equal([again[index] for index in range(size * 8)], records)
    for epoch in records.reshape(8, size):
        counts = np.bincount(LABELS[epoch], minlength=5)
        assert counts[3] == 0
        assert set(counts[[0, 1, 2, 4]]) <= {7, 8}
    assert set(records) == set(np.flatnonzero(LABELS >= 0))
    # A class begins anew only when all its images were there.
    of_zero = records[LABELS[records] == 0]
    assert len(set(of_zero)) == 50
    assert np.bincount(of_zero).max() <= -(-len(of_zero) // 50) + 1
    # Nor does it begin with its first records.
    early = records[:size][LABELS[records[:size]] == 0]
    assert max(early) > 20
    # Epochs and neighbouring classes differ in their order.
    first, second = (LABELS[records[e * size : (e + 1) * size]] for e in (0, 1))
    assert (first != second).any()
    assert (first[:-4] != first[4:]).any()
