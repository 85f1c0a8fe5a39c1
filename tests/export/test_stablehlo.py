"""StableHLO files, as a program without this package loads them."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest
from helpers import exporting, golden

from cotnet_jax.data import transforms
from cotnet_jax.export import to_stablehlo
from cotnet_jax.export.options import Preparation
from cotnet_jax.export.stablehlo_format import resize_and_crop

pytestmark = pytest.mark.end_to_end


def load(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        call = jax.export.deserialize(bytearray(archive.read("program.jax_export"))).call
        return jax.jit(call), json.loads(archive.read("description.json"))


def test_preprocessing_inside_of_any_batch_and_size(tiny):
    call, description = load(to_stablehlo(tiny, preprocess=True, fold=True))
    assert description["input"]["shape"] == ["batch", "height", "width", 3]
    for count, height, width in ((1, 45, 60), (3, 100, 77)):
        images = exporting.smooth_images(count, height, width)
        probabilities = np.asarray(call(images))
        expected = tiny(np.stack([tiny.prepare(image) for image in images]))
        np.testing.assert_allclose(probabilities, expected, rtol=0.01, atol=1e-3)
        assert np.argsort(-probabilities)[:, :5].tolist() == np.argsort(-expected)[:, :5].tolist()


def test_description(tiny):
    description = load(to_stablehlo(tiny, batch_size=2, logits=True))[1]
    assert description["input"] == {
        "name": "images",
        "dtype": "float32",
        "shape": [2, 40, 40, 3],
        "values": "normalised",
        "channels": "RGB",
    }
    assert tuple(description["class_names"]) == exporting.NAMES
    assert (description["model"], description["output"]) == ("cotnet_tiny", "logits")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_as_in_evaluation(interpolation):
    preparation = Preparation(64, 0.875, interpolation, (0, 0, 0), (1, 1, 1))
    resize = jax.jit(resize_and_crop, static_argnums=1)
    for height, width in [(73, 73), (150, 100), (100, 151), (20, 31), (1, 1), (9, 200)]:
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        expected = np.stack(
            [
                transforms.eval_transform(image, 64, crop=0.875, interpolation=interpolation)
                for image in images
            ]
        )
        levels = np.abs(np.asarray(resize(images, preparation)) - expected)
        assert levels.max() <= 1 and np.mean(levels > 0) < 0.05, (height, width)


def test_cotnet50_gives_the_originals_logits(cotnet50):
    call, _ = load(to_stablehlo(cotnet50.predictor, logits=True))
    logits = call(cotnet50.images)
    assert golden.relative_error(logits[:2], cotnet50.logits) < 1e-5
