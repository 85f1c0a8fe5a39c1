"""Mixup, CutMix, soft targets and normalisation, alone, jitted and inside shard_map."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy import stats

from cotnet_jax.data.normalize import normalize
from cotnet_jax.training import mixup

GOLDENS = Path(__file__).parents[1] / "goldens"
RECIPE = {
    "num_classes": 10,
    "probability": 1.0,
    "cutmix_probability": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
}
LABELS = np.arange(8)
PLAIN = 0.9 * np.eye(10)[LABELS] + 0.01


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).randint(0, 256, (8, 20, 30, 3), np.uint8)


@pytest.mark.parametrize("x64", [False, True])
def test_cutmix_box_equals_golden(x64):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        for case in json.loads((GOLDENS / "cutmix.json").read_text()):
            *box, lam = mixup.cutmix_box(
                jnp.asarray(case["lam"], dtype),
                case["center_y"],
                case["center_x"],
                case["height"],
                case["width"],
            )
            assert [int(side) for side in box] == case["box"]
            assert float(lam) == pytest.approx(case["corrected_lam"], abs=0 if x64 else 1e-7)


def test_cutmix_box_follows_the_formula_for_odd_sizes_too():
    random = np.random.RandomState(0)
    height, width = 33, 57
    lam = random.uniform(size=2000)
    center_y, center_x = random.randint(height, size=2000), random.randint(width, size=2000)
    with jax.enable_x64(True):
        *box, remaining = mixup.cutmix_box(jnp.asarray(lam), center_y, center_x, height, width)
    side = np.sqrt(1 - lam)
    half_h, half_w = (height * side).astype(int) // 2, (width * side).astype(int) // 2
    y0, y1 = (np.clip(center_y + d, 0, height) for d in (-half_h, half_h))
    x0, x1 = (np.clip(center_x + d, 0, width) for d in (-half_w, half_w))
    np.testing.assert_array_equal(box, [y0, y1, x0, x1])
    np.testing.assert_allclose(remaining, 1 - (y1 - y0) * (x1 - x0) / (height * width))


def mixed(images, seeds, **changes):
    step = jax.jit(functools.partial(mixup.mix_batch, **(RECIPE | changes)))
    return [map(np.asarray, step(jax.random.key(seed), images, LABELS)) for seed in seeds]


def recover_lam(targets):
    """The share of the batch itself, from its first target."""
    return (targets[0, LABELS[0]] - 0.01) / 0.9


def test_mixup_blends_with_the_reversed_batch(images):
    lams = []
    for result, targets in mixed(images, range(400), cutmix_alpha=0.0):
        lam = recover_lam(targets)
        lams.append(lam)
        np.testing.assert_allclose(result, lam * images + (1 - lam) * images[::-1], atol=1e-3)
        np.testing.assert_allclose(targets, lam * PLAIN + (1 - lam) * PLAIN[::-1], atol=1e-6)
    assert stats.kstest(lams, stats.beta(0.8, 0.8).cdf).pvalue > 0.001


def test_cutmix_takes_a_rectangle_from_the_reversed_batch(images):
    lams = []
    for result, targets in mixed(images, range(400), mixup_alpha=0.0):
        taken = (result != images).any(axis=(0, 3))
        rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
        expected = images.copy()
        if rows.size:
            box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            expected[box] = images[::-1][box]
        np.testing.assert_array_equal(result, expected)
        lam = 1 - rows.size * columns.size / taken.size
        lams.append(lam)
        np.testing.assert_allclose(targets, lam * PLAIN + (1 - lam) * PLAIN[::-1], atol=1e-6)
    rng = np.random.RandomState(1)
    by_formula = [share_by_formula(20, 30, rng) for _ in range(20_000)]
    assert stats.ks_2samp(lams, by_formula).pvalue > 0.001


def share_by_formula(height, width, rng):
    """What a CutMix of uniform share leaves of an image."""
    side = np.sqrt(1 - rng.uniform())
    remaining = []
    for length in (height, width):
        center, half = rng.randint(length), int(length * side) // 2
        remaining.append(np.clip([center - half, center + half], 0, length))
    (y0, y1), (x0, x1) = remaining
    return 1 - (y1 - y0) * (x1 - x0) / (height * width)


def is_cutmix(result):
    return not (result % 1).any()


def test_kinds_are_drawn_with_their_probabilities(images):
    results = mixed(images, range(400))
    cutmix = sum(is_cutmix(result) for result, _ in results)
    assert stats.binomtest(cutmix, 400, 0.5).pvalue > 0.001
    results = mixed(images, range(400), probability=0.25)
    unmixed = sum(np.array_equal(result, images) for result, _ in results)
    # A CutMix box of no pixels, 2 % of all, leaves the batch as it was, too.
    assert stats.binomtest(unmixed, 400, 0.755).pvalue > 0.001


def test_off_means_plain_pixels_and_smooth_targets(images):
    for changes in ({"probability": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}):
        ((result, targets),) = mixed(images, [0], **changes)
        np.testing.assert_array_equal(result, images)
        np.testing.assert_allclose(targets, PLAIN, rtol=1e-6)


def test_same_key_same_batch(images):
    (first, _), (second, _), (other, _) = mixed(images, [3, 3, 4])
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_negative_alpha_names_the_fields(images):
    with pytest.raises(ValueError, match=r"config\.mixing.*mixup_alpha = -1"):
        mixed(images, [0], mixup_alpha=-1)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_dtypes(images, dtype):
    expected = jnp.float64 if dtype == "float64" else jnp.float32
    with jax.enable_x64(dtype == "float64"):
        result, targets = jax.eval_shape(
            functools.partial(mixup.mix_batch, **RECIPE),
            jax.random.key(0),
            jnp.asarray(images, dtype),
            LABELS,
        )
    assert (result.dtype, targets.dtype) == (expected, expected)
    assert (result.shape, targets.shape) == (images.shape, (8, 10))


def test_normalize(images):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images / 255 - mean) / std
    result = normalize(images, mean, std, jnp.float32)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert normalize(images, mean, std, jnp.bfloat16).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        result = normalize(jnp.asarray(images, jnp.float64), mean, std, jnp.float64)
        np.testing.assert_allclose(result, expected, atol=1e-14)


def test_inside_shard_map_each_device_mixes_alone(images):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    def step(key, images, labels):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return mixup.mix_batch(key, images, labels, **RECIPE)

    result, targets = step(jax.random.key(0), images, LABELS)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected, expected_targets = mixup.mix_batch(key, images, LABELS, **RECIPE)
    np.testing.assert_allclose(result, expected, atol=1e-3)
    np.testing.assert_allclose(targets, expected_targets, atol=1e-6)
    compiled = step.lower(jax.random.key(0), images, LABELS).compile().as_text()
    assert "all-gather" not in compiled
