"""RandAugment against the goldens and its sampling rules; colour jitter and random erasing."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cotnet_jax.data import randaugment

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "randaugment.json").read_text())["cases"]
ARRAYS = np.load(GOLDENS / "randaugment.npz")
RECIPE = "rand-m15-mstd0.5-n2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
def test_operation_equals_golden(case):
    call = randaugment.Call(
        case["op"], case["magnitude"], case["sign"], tuple(case.get("center_xy", (0, 0)))
    )
    result = np.array(call(Image.fromarray(ARRAYS["image"])))
    np.testing.assert_array_equal(result, ARRAYS[case["key"]])


def test_every_operation_has_a_golden():
    assert {case["op"] for case in CASES} == set(randaugment.OP_NAMES)
    assert len(randaugment.OP_NAMES) == 16


def test_posterize_to_no_bits_is_black():
    image = Image.fromarray(ARRAYS["image"])
    for magnitude in (0, 2.4):
        assert not np.array(randaugment.Call("Posterize", magnitude)(image)).any()


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    augment = randaugment.parse(RECIPE)
    return [augment.draw(rng, 48, 64) for _ in range(20_000)]


def test_half_of_the_operations_are_applied(draws):
    counts = Counter(len(calls) for calls in draws)
    # Two independent operations, each applied with probability 0.5 on average.
    observed = [counts[number] for number in range(3)]
    assert stats.chisquare(observed, [5000, 10_000, 5000]).pvalue > 0.001


def test_operations_are_uniform(draws):
    counts = Counter(call.name for calls in draws for call in calls)
    assert stats.chisquare([counts[name] for name in randaugment.OP_NAMES]).pvalue > 0.001
    # With replacement: 1/16 of the pairs are twins.
    pairs = [calls for calls in draws if len(calls) == 2]
    twins = sum(first.name == second.name for first, second in pairs)
    assert stats.binomtest(twins, len(pairs), 1 / 16).pvalue > 0.001


def test_magnitudes_are_normal_and_clipped(draws):
    magnitudes = np.array([call.magnitude for calls in draws for call in calls])
    edges = [13.5, 14, 14.25, 14.5, 14.75, 15]
    below = np.histogram(magnitudes[magnitudes < 15], edges)[0]
    observed = [*below, (magnitudes == 15).sum()]
    probabilities = [*np.diff(stats.norm(15, 0.5).cdf(edges)), 0.5]
    expected = np.array(probabilities) / sum(probabilities) * sum(observed)
    assert magnitudes.max() == 15
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_signs_and_centres(draws):
    calls = [call for calls in draws for call in calls]
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        signs = [call.sign for call in calls if call.name == name]
        assert set(signs) == {-1, 1}
        assert stats.binomtest(signs.count(1), len(signs), 0.5).pvalue > 0.001
    centers = np.array([call.center_xy for call in calls if call.name == "Cutout"])
    for axis, side in enumerate((64, 48)):
        assert stats.kstest(centers[:, axis] / side, "uniform").pvalue > 0.001


class Loaded:
    """A generator whose random() always gives the same number."""

    def __init__(self, value):
        self._value, self._rng = value, np.random.default_rng(0)

    def random(self):
        return self._value

    def __getattr__(self, name):
        return getattr(self._rng, name)


@pytest.mark.parametrize(
    ("value", "share"), [(0.19, 1), (0.35, 0.75), (0.5, 0.5), (0.65, 0.25), (0.81, 0)]
)
def test_probability_is_itself_uniform_between_02_and_08(value, share):
    augment, rng = randaugment.parse(RECIPE), Loaded(value)
    applied = sum(len(augment.draw(rng, 48, 64)) for _ in range(10_000))
    assert stats.binomtest(applied, 20_000, share).pvalue > 0.001


def test_same_generator_state_same_image():
    augment = randaugment.parse(RECIPE)
    image = Image.fromarray(ARRAYS["image"])
    for seed in range(50):
        first, second = (augment(image, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(np.array(first), np.array(second))
        assert (first.mode, first.size) == ("RGB", (64, 48))
    np.testing.assert_array_equal(np.array(image), ARRAYS["image"])


def test_parse():
    assert randaugment.parse("") is None
    assert randaugment.parse(RECIPE) == randaugment.RandAugment(15, 0.5, 2)
    assert randaugment.parse("rand-n3-m9") == randaugment.RandAugment(9, 0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rand", ["magnitude", "missing"]),
        ("auto-m9", ["'auto'"]),
        ("rand-m16-n0", ["16 is above 15", "n is less than 1"]),
        ("rand-m3-m4-q5-n1.5", ["'m' is given twice", "'q5'", "'n1.5'"]),
        ("rand-mx", ["'mx'"]),
        ("rand-m9-inc1", ["'inc1'"]),
    ],
)
def test_parse_names_everything_that_is_wrong(text, words):
    with pytest.raises(ValueError, match=r"config\.augment\.randaugment") as error:
        randaugment.parse(text)
    for word in [*words, RECIPE]:
        assert word in str(error.value)


def test_color_jitter_strengths():
    image = Image.fromarray(ARRAYS["image"])
    rng = np.random.default_rng(0)
    assert randaugment.color_jitter(image, rng, 0) is image
    jittered = [np.array(randaugment.color_jitter(image, rng, 0.4)) for _ in range(500)]
    means = [image.mean() / ARRAYS["image"].mean() for image in jittered]
    assert 0.55 < min(means) < 0.7
    assert 1.2 < max(means) < 1.45


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_random_erasing(mode):
    image = np.full((64, 48, 3), 250, np.uint8)
    rng = np.random.default_rng(0)
    settings = {"mode": mode, "area": (0.02, 1 / 3), "ratio": (0.3, 1 / 0.3)}
    shares, erased = [], 0
    for _ in range(2000):
        result = randaugment.random_erasing(
            image, rng, probability=0.25, mean=MEAN, std=STD, **settings
        )
        changed = (result != 250).all(axis=-1)
        if not changed.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shares.append(box[..., 0].size / image[..., 0].size)
        if mode == "const":
            assert (box == np.rint(255 * np.array(MEAN))).all()
        elif box.size > 3000:
            normal = (box / 255 - MEAN) / STD
            assert abs(normal.mean()) < 0.15
            assert 0.85 < normal.std() < 1.1
    assert stats.binomtest(erased, 2000, 0.25).pvalue > 0.001
    assert 0.01 < min(shares) < 0.04
    assert 0.28 < max(shares) < 0.36
    assert (image == 250).all()


def test_unknown_erasing_mode_names_the_field():
    with pytest.raises(ValueError, match=r"config\.augment\.erasing_mode.*'const' or 'pixel'"):
        randaugment.random_erasing(
            ARRAYS["image"],
            np.random.default_rng(0),
            probability=1,
            mode="rand",
            area=(0.02, 0.3),
            ratio=(0.3, 3),
            mean=MEAN,
            std=STD,
        )
