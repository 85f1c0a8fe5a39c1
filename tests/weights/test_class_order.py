"""Weights and datasets agree on classes by name; same names in another order are mapped."""

import numpy as np
import pytest

from cotnet_jax.data import class_names, imagenet
from cotnet_jax.weights.class_order import match_classes
from cotnet_jax.weights.folder import WeightsError


def head(classes):
    kernel = np.arange(3 * classes, dtype=np.float32).reshape(3, classes)
    return {"params": {"head": {"kernel": kernel, "bias": np.arange(classes)}}, "batch_stats": {}}


def match(names, dataset_names, **options):
    variables = head(len(dataset_names))
    matched = match_classes(variables, names, dataset_names, weights="w", **options)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], range(len(dataset_names)))
    kernel, bias = matched["params"]["head"]["kernel"], matched["params"]["head"]["bias"]
    np.testing.assert_array_equal(kernel[0], bias)
    return bias.tolist()


@pytest.mark.parametrize(
    ("names", "dataset_names"),
    [
        ("abc", "abc"),
        (None, "abc"),
        (("a\nb", " c"), ("a\\nb", "c")),
        (("caf\u00e9", "c"), ("cafe\u0301", "c")),
        (class_names.imagenet_names(), imagenet.wnids()),
        (imagenet.wnids(), class_names.imagenet_names()),
    ],
    ids=["same", "unknown", "as text", "accents", "words", "WordNet ids"],
)
def test_the_same_names_change_nothing(names, dataset_names):
    assert match(names, dataset_names) == list(range(len(dataset_names)))


def test_the_same_names_in_another_order_are_mapped(caplog):
    caplog.set_level("INFO")
    assert match("abcd", "cadb") == [2, 0, 3, 1]
    assert "the same 4 classes in another order" in caplog.text
    ids = imagenet.wnids()
    assert match(class_names.imagenet_names(), ids[1:] + ids[:1])[:2] == [1, 2]


@pytest.mark.parametrize(
    ("names", "dataset_names", "words"),
    [
        ("abc", "abd", r"only the weights have 'c'; only the dataset has 'd'"),
        ("abcdefgh", "ABCDEFGH", r"'a', 'b', 'c' and 5 more; only the dataset has 'A'"),
        ("aab", "aba", "a name is there several times"),
        (imagenet.wnids(), [f"class {i}" for i in range(1000)], "and 997 more"),
    ],
)
def test_other_names_are_refused_unless_accepted(names, dataset_names, words, caplog):
    with pytest.raises(WeightsError, match=words) as error:
        match(names, dataset_names)
    assert "--config.accept_classes=True" in str(error.value)
    assert match(names, dataset_names, accept=True) == list(range(len(dataset_names)))
    assert "as accepted" in caplog.text
