"""Batch norms folded into convolutions."""

import jax
import numpy as np
import pytest
from helpers.random_variables import random_variables

from cotnet_jax.models.cotnet import CoTNet
from cotnet_jax.models.folding import fold_batch_norm, is_folded
from cotnet_jax.models.variants import Variant


def batch_norms(params, statistics):
    for name, inside in statistics.items():
        if "var" in inside:
            yield params[name] | inside
        else:
            yield from batch_norms(params[name], inside)


# All stems, shortcuts and layers.
@pytest.mark.parametrize(
    "variant",
    [
        Variant((1, 1, 1, 1), planes=(8,) * 4, cardinality=2),
        Variant((1, 1, 1, 1), planes=(8,) * 4, stem_width=4, split_attention=True),
    ],
    ids=["7x7 stem, CoXt", "3x3 stem, split attention"],
)
def test_folded_networks_compute_the_same(variant):
    model = CoTNet(variant, num_classes=5)
    variables = random_variables(model, 32)
    before = jax.tree.map(np.copy, variables)
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)

    folded = fold_batch_norm(variables)

    norms = list(batch_norms(folded["params"], folded["batch_stats"]))
    assert len(norms) == len(list(batch_norms(variables["params"], variables["batch_stats"]))) > 20
    assert all(is_folded(norm) for norm in norms)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {np.dtype(np.float32)}
    apply = jax.jit(model.apply)
    expected = apply(variables, images)
    np.testing.assert_allclose(apply(folded, images), expected, rtol=2e-5, atol=2e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3


def test_a_new_batch_norm_is_not_folded():
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    assert not is_folded({"scale": ones, "bias": zeros, "mean": zeros, "var": ones})


def test_a_batch_norm_without_a_known_convolution():
    norm = {"scale": np.ones(2), "bias": np.zeros(2)}
    variables = {
        "params": {"block": {"conv9": {"kernel": np.ones((1, 1, 2, 2))}, "bn9": norm}},
        "batch_stats": {"block": {"bn9": {"mean": np.zeros(2), "var": np.ones(2)}}},
    }
    with pytest.raises(ValueError, match="no convolution is known before block/bn9"):
        fold_batch_norm(variables)
