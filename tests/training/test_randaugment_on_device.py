"""RandAugment on the device: the host's pixels, and the host's distributions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cotnet_jax.data import randaugment as host
from cotnet_jax.distributed import sharding
from cotnet_jax.tools.check_randaugment import as_operations
from cotnet_jax.training.randaugment import warps
from cotnet_jax.training.randaugment.batch import apply_operations, randaugment_batch
from cotnet_jax.training.randaugment.draw import NONE, Operations, draw
from cotnet_jax.training.randaugment.selected import replace_selected
from cotnet_jax.training.randaugment.tables import _autocontrast_tables

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "randaugment.json").read_text())["cases"]
ARRAYS = np.load(GOLDENS / "randaugment.npz")
RECIPE = host.parse("rand-m15-mstd0.5-n2")
NUM_DRAWN = 20_000


def assert_like_host(found, expected, calls):
    for one, other, call in zip(found, expected, calls, strict=True):
        difference = np.abs(one.astype(int) - other).max(axis=-1)
        if call.name in warps.NAMES:
            assert difference.max() <= 1, call
            assert (difference > 0).mean() <= 0.01, call
        else:
            assert difference.max() == 0, call


def apply(images, calls):
    """Apply calls in batches of one shape, which is compiled once."""
    filled = [*calls, *[calls[0]] * (len(CASES) - len(calls))]
    images = np.concatenate([images, np.zeros((len(CASES) - len(calls), 48, 64, 3), np.uint8)])
    return np.asarray(_apply(images, as_operations(filled)))[: len(calls)]


_apply = jax.jit(apply_operations)


def test_goldens():
    calls = [
        host.Call(case["op"], case["magnitude"], case["sign"], tuple(case.get("center_xy", (0, 0))))
        for case in CASES
    ]
    images = np.repeat(ARRAYS["image"][None], len(calls), axis=0)
    found = apply(images, calls)
    assert_like_host(found, [ARRAYS[case["key"]] for case in CASES], calls)


def pictures(number):
    """Smooth pictures of 48 x 64 with noise, whose channels have ranges of their own."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 48))
    a, b, c = rng.uniform(-9, 9, (3, number, 1, 1, 3))
    waves = np.sin(a * x[..., None] + b * y[..., None] + c)
    waves += 0.2 * rng.normal(size=waves.shape)
    low, high = np.sort(rng.integers(0, 256, (2, number, 1, 1, 3)), axis=0)
    return np.clip(low + (high - low) * (waves + 1) / 2, low, high).astype(np.uint8)


def test_random_calls_give_the_hosts_pixels():
    rng = np.random.default_rng(1)
    calls = [
        host.Call(
            name,
            rng.integers(0, 15 * 256, endpoint=True) / 256,
            int(rng.choice([-1, 1])) if name in host.SIGNED else 1,
            tuple(np.float32(rng.uniform(0, (64, 48))).tolist()),
        )
        for name in host.OP_NAMES
        for _ in range(5)
    ]
    images = pictures(len(calls))
    expected = [
        np.array(call(Image.fromarray(image))) for call, image in zip(calls, images, strict=True)
    ]
    assert_like_host(apply(images, calls), expected, calls)


def test_autocontrast_of_all_ranges():
    low, high = np.triu_indices(256)
    histograms = np.zeros((len(low), 256), np.int32)
    histograms[np.arange(len(low)), low] = 1
    histograms[np.arange(len(low)), high] = 1
    found = np.asarray(jax.jit(_autocontrast_tables)(histograms))
    # As Pillow's ImageOps.autocontrast, in double precision.
    scale = 255.0 / np.maximum(high - low, 1)
    tables = np.arange(256) * scale[:, None] + (-low * scale)[:, None]
    expected = np.where((high > low)[:, None], tables.astype(int).clip(0, 255), np.arange(256))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("picked", [0, 1, 7, 32, 40])
def test_selected_rows_are_replaced_and_no_others(picked):
    selected = np.zeros(40, bool)
    selected[np.random.default_rng(0).permutation(40)[:picked]] = True
    values = np.arange(40.0)
    found = jax.jit(lambda a, s: replace_selected(a, s, lambda rows: -rows, (a,)))(values, selected)
    np.testing.assert_array_equal(found, np.where(selected, -values, values))


def test_an_image_without_operation_stays():
    images = pictures(len(CASES))
    none = Operations(
        *jax.tree.map(jnp.zeros_like, as_operations([host.Call("Invert", 0)] * len(CASES)))
    )
    none = none._replace(op=jnp.full_like(none.op, NONE))
    np.testing.assert_array_equal(_apply(images, none), images)


@pytest.fixture(scope="module")
def drawn():
    """Two operations for each of many images of 48 x 64, as NumPy arrays [2, images, ...]."""
    draws = jax.jit(lambda key: draw(key, NUM_DRAWN, 48, 64, RECIPE))(jax.random.key(0))
    return Operations(*map(np.asarray, draws))


def test_half_of_the_operations_are_applied(drawn):
    counts = np.bincount((drawn.op != NONE).sum(axis=0), minlength=3)
    assert stats.chisquare(counts, NUM_DRAWN * np.array([0.25, 0.5, 0.25])).pvalue > 0.001


def test_operations_are_uniform_and_independent(drawn):
    applied = drawn.op[drawn.op != NONE]
    assert stats.chisquare(np.bincount(applied, minlength=16)).pvalue > 0.001
    pairs = drawn.op[:, (drawn.op != NONE).all(axis=0)]
    twins = (pairs[0] == pairs[1]).sum()
    assert stats.binomtest(int(twins), pairs.shape[1], 1 / 16).pvalue > 0.001


def test_magnitudes_are_normal_and_clipped(drawn):
    rotated = drawn.op == host.OP_NAMES.index("Rotate")
    magnitudes = np.abs(drawn.value[rotated]) / host.operation_value("Rotate", 1)
    edges = [13.5, 14.25, 14.75, 15]
    below = np.histogram(magnitudes[magnitudes < 14.999], edges)[0]
    observed = [*below, (magnitudes >= 14.999).sum()]
    probabilities = np.array([*np.diff(stats.norm(15, 0.5).cdf(edges)), 0.5])
    expected = probabilities / probabilities.sum() * sum(observed)
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_signs_and_centres(drawn):
    for index, name in enumerate(host.OP_NAMES):
        values = drawn.value[drawn.op == index]
        if name in host.SIGNED:
            assert stats.binomtest(int((values < 0).sum()), len(values), 0.5).pvalue > 0.001
        else:
            assert (values >= 0).all()
    centers = drawn.center_xy[drawn.op == host.OP_NAMES.index("Cutout")]
    for axis, side in enumerate((64, 48)):
        assert stats.kstest(centers[:, axis] / side, "uniform").pvalue > 0.001


def test_without_deviation_every_value_is_the_hosts():
    settings = host.parse("rand-m9-n1")
    drawn = Operations(*map(np.asarray, draw(jax.random.key(1), 2000, 8, 8, settings)))
    applied = drawn.op != NONE
    expected = [host.operation_value(host.OP_NAMES[i], 9) for i in drawn.op[applied]]
    np.testing.assert_array_equal(np.abs(drawn.value[applied]), np.float32(expected))


def test_probability_is_itself_uniform_between_02_and_08(monkeypatch):
    uniform = jax.random.uniform
    for value, share in [(0.19, 1), (0.35, 0.75), (0.5, 0.5), (0.65, 0.25), (0.81, 0)]:
        # The call without a range is the one that is compared with the probability.
        monkeypatch.setattr(
            jax.random,
            "uniform",
            lambda key, shape, value=value, **range_: (
                uniform(key, shape, **range_) if range_ else jnp.full(shape, value)
            ),
        )
        index = np.asarray(draw(jax.random.key(2), 5000, 8, 8, RECIPE).op)
        assert stats.binomtest(int((index != NONE).sum()), index.size, share).pvalue > 0.001


def test_same_key_same_images():
    images = pictures(8)
    # As in the train step, whose manual axes every loop must carry along.
    augment = jax.jit(
        jax.shard_map(
            lambda key, images: randaugment_batch(key, images, RECIPE),
            mesh=sharding.make_mesh(jax.devices()[:1]),
            in_specs=(sharding.REPLICATED, sharding.SHARDED),
            out_specs=sharding.SHARDED,
        )
    )
    first, again, other = (augment(jax.random.key(seed), images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.dtype, first.shape) == (jnp.uint8, images.shape)
