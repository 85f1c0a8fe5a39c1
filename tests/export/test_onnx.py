"""ONNX files in ONNX Runtime: the model's own logits, for every layer and option."""

import json

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import exporting, golden
from helpers.random_variables import random_variables

from cotnet_jax.data import transforms
from cotnet_jax.export import Options, to_onnx
from cotnet_jax.export.onnx_format import network, preprocess
from cotnet_jax.export.onnx_format.graph import Features, Graph
from cotnet_jax.export.options import Preparation
from cotnet_jax.models.cotnet import CoTNet
from cotnet_jax.models.folding import fold_batch_norm
from cotnet_jax.models.variants import Variant

pytestmark = pytest.mark.end_to_end

TOLERANCE = 1e-5


def run(content, images):
    if not isinstance(content, bytes):
        content = content.SerializeToString()
    return onnxruntime.InferenceSession(content).run(None, {"images": images})[0]


def value(name, dtype, shape):
    return onnx.helper.make_tensor_value_info(name, dtype, shape)


SMALL = {"blocks": (1, 1, 1, 1), "planes": (8, 8, 8, 16)}
SE = {"stem_width": 4, "strides": (2, 2, 2, 2), "average_down": True, "split_attention": True}


# Odd sides, and a last stage of a single pixel that is blurred.
@pytest.mark.parametrize(
    ("variant", "size", "output_stride"),
    [
        (Variant(**SMALL), 33, 32),
        (Variant(**SMALL, cardinality=2), 50, 32),
        (Variant(**SMALL | {"blocks": (1, 1, 2, 1)}, **SE, blur=True), 27, 32),
        (Variant(**SMALL | {"blocks": (1, 1, 2, 1)}, **SE), 45, 8),
    ],
    ids=["CoT", "CoXt", "SE-CoTNetD with blur", "SE-CoTNetD, dilated"],
)
def test_every_layer(variant, size, output_stride):
    model = CoTNet(variant, num_classes=7, output_stride=output_stride)
    variables = random_variables(model, size)
    images = np.random.default_rng(1).standard_normal((3, size, size, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(variables, images)
    for weights in (variables, fold_batch_norm(variables)):
        graph = Graph()
        pixels = graph.add("Transpose", "channels_first", ["images"], perm=[0, 3, 1, 2])
        merged = network.merge(weights["params"], weights["batch_stats"])
        logits = network.add_network(graph, Features(pixels, 3, size), merged, model)
        file = graph.model(
            [value("images", onnx.TensorProto.FLOAT, ["n", size, size, 3])],
            [value(logits, onnx.TensorProto.FLOAT, ["n", 7])],
            {},
            name="test",
            version="0",
        )
        operators = {node.op_type for node in file.graph.node}
        assert ("BatchNormalization" in operators) == (weights is variables)
        for count in (1, 3):
            error = golden.relative_error(run(file, images[:count]), expected[:count])
            assert error < TOLERANCE, (count, error)


@pytest.mark.parametrize("fold", [False, True])
def test_cotnet50_gives_the_originals_logits(cotnet50, fold):
    model = network.build(cotnet50.predictor, Options(fold=fold, logits=True))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert len(model.graph.node) < 600
    for count in (1, 3):
        logits = session.run(None, {"images": cotnet50.images[:count]})[0]
        assert logits.shape == (count, 1000)
        known = cotnet50.logits[:count]
        assert golden.relative_error(logits[: len(known)], known) < TOLERANCE
        # The third image, of which there is no golden, in its own batch.
        alone = session.run(None, {"images": cotnet50.images[count - 1 : count]})[0]
        assert golden.relative_error(logits[-1:], alone) < TOLERANCE


@pytest.mark.parametrize("fold", [False, True])
def test_probabilities_of_normalised_images(tiny, fold):
    pixels = exporting.smooth_images(3, exporting.SIZE, exporting.SIZE)
    settings = tiny.settings
    images = (pixels / 255 - settings["mean"]) / settings["std"]
    content = to_onnx(tiny, fold=fold)
    for count in (1, 3):
        probabilities = run(content, images[:count].astype(np.float32))
        np.testing.assert_allclose(probabilities, tiny(pixels)[:count], rtol=1e-4, atol=1e-6)


def test_preprocessing_inside(tiny):
    session = onnxruntime.InferenceSession(to_onnx(tiny, preprocess=True))
    for count, height, width in ((1, 45, 60), (3, 100, 77)):
        images = exporting.smooth_images(count, height, width)
        probabilities = session.run(None, {"images": images})[0]
        expected = tiny(np.stack([tiny.prepare(image) for image in images]))
        np.testing.assert_allclose(probabilities, expected, rtol=0.01, atol=1e-3)
        assert np.argsort(-probabilities)[:, :5].tolist() == np.argsort(-expected)[:, :5].tolist()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_resizing_as_in_evaluation(interpolation, crop):
    preparation = Preparation(64, crop, interpolation, (0, 0, 0), (1, 1, 1))
    graph = Graph()
    pixels = graph.add("Transpose", "channels_first", ["images"], perm=[0, 3, 1, 2])
    result = preprocess.resize_and_crop(graph, "images", pixels, preparation)
    file = graph.model(
        [value("images", onnx.TensorProto.UINT8, ["n", "h", "w", 3])],
        [value(result, onnx.TensorProto.UINT8, ["n", 3, None, None])],
        {},
        name="test",
        version="0",
    )
    session = onnxruntime.InferenceSession(file.SerializeToString())
    sizes = [(73, 99), (99, 74), (64, 64), (300, 200), (20, 31), (1, 1), (9, 200)]
    for height, width in sizes:
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        expected = np.stack(
            [
                transforms.eval_transform(image, 64, crop=crop, interpolation=interpolation)
                for image in images
            ]
        )
        cropped = session.run(None, {"images": images})[0].transpose(0, 2, 3, 1)
        levels = np.abs(cropped.astype(int) - expected)
        assert levels.max() <= 2 and np.mean(levels > 0) < 0.05, (height, width)


def test_description(tiny):
    session = onnxruntime.InferenceSession(to_onnx(tiny, preprocess=True, fold=True))
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", "height", "width", 3],
    )
    assert (output.name, output.type, output.shape) == (
        "probabilities",
        "tensor(float)",
        ["batch", 10],
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["model"] == "cotnet_tiny" and metadata["weights"] == "ema"
    assert tuple(json.loads(metadata["class_names"])) == exporting.NAMES
    assert json.loads(metadata["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(metadata["crop"]) == 0.875 and json.loads(metadata["image_size"]) == 40


def test_a_fixed_batch_and_logits(tiny):
    session = onnxruntime.InferenceSession(to_onnx(tiny, batch_size=2, logits=True))
    assert session.get_inputs()[0].shape == [2, 40, 40, 3]
    assert (session.get_outputs()[0].name, session.get_outputs()[0].shape) == ("logits", [2, 10])
    zeros = np.zeros((2, 40, 40, 3), np.float32)
    logits = session.run(None, {"images": zeros})[0]
    expected = jax.jit(tiny.model.apply)(tiny.variables, zeros)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
