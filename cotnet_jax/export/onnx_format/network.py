"""A whole CoTNet as an ONNX model."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import onnx

from cotnet_jax.export.onnx_format import layers, preprocess
from cotnet_jax.export.onnx_format.graph import Features, Graph
from cotnet_jax.export.options import INPUT, Options, describe, preparation_of
from cotnet_jax.models.cotnet import CoTNet, key_groups_of
from cotnet_jax.models.folding import fold_batch_norm
from cotnet_jax.predictor import Predictor

_TYPES = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}


def build(predictor: Predictor, options: Options) -> onnx.ModelProto:
    """Return the ONNX model of a predictor, with its weights and its description.

    Values of the metadata that are no text are in JSON.
    """
    variables = fold_batch_norm(predictor.variables) if options.fold else predictor.variables
    weights = merge(variables["params"], variables["batch_stats"])
    preparation = preparation_of(predictor)
    description = describe(predictor, options)

    graph = Graph()
    pixels = graph.add("Transpose", "channels_first", [INPUT], perm=[0, 3, 1, 2])
    if options.preprocess:
        pixels = preprocess.resize_and_crop(graph, INPUT, pixels, preparation)
        x = preprocess.normalize(graph, pixels, preparation)
    else:
        x = Features(pixels, 3, preparation.image_size)
    logits = add_network(graph, x, weights, predictor.model)
    result = graph.add("Identity" if options.logits else "Softmax", options.output, [logits])

    images = description["input"]
    rows = images["shape"][0]
    return graph.model(
        [onnx.helper.make_tensor_value_info(INPUT, _TYPES[images["dtype"]], images["shape"])],
        [
            onnx.helper.make_tensor_value_info(
                result, onnx.TensorProto.FLOAT, [rows, len(predictor.names)]
            )
        ],
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in description.items()
        },
        name=predictor.model_name,
        version=description["versions"]["cotnet_jax"],
    )


def add_network(graph: Graph, x: Features, weights: layers.Weights, model: CoTNet) -> str:
    """Add the network, and return the name of the logits."""
    with graph.scope("stem"):
        x = _stem(graph, x, weights["stem"])
    if not model.variant.stem_width:
        x = layers.max_pool_3x3(graph, x, 2)
    for stage, blocks in enumerate(model.bottlenecks(), start=1):
        for index, block in enumerate(blocks):
            name = f"stage{stage}_block{index}"
            with graph.scope(name):
                x = _bottleneck(graph, x, weights[name], block)
    pooled = layers.mean_over_pixels(graph, x)
    flat = graph.add("Flatten", "features", [pooled.name])
    head = {part: weights["head"][part] for part in ("kernel", "bias")}
    return graph.add("Gemm", "head", [flat], head)


def _stem(graph, x, weights):
    if "conv2" not in weights:
        return layers.relu(graph, layers.conv(graph, x, weights, "conv1", "bn", strides=2))
    x = layers.relu(graph, layers.conv(graph, x, weights, "conv1", "bn1", strides=2))
    x = layers.relu(graph, layers.conv(graph, x, weights, "conv2", "bn2"))
    return layers.relu(graph, layers.conv(graph, x, weights, "conv3", "bn"))


def _bottleneck(graph, x, weights, block):
    """Add a ``Bottleneck`` with the attributes ``block``."""
    y = layers.relu(graph, layers.conv(graph, x, weights, "conv1", "bn1"))
    y = _spatial(graph, y, weights, block)
    y = layers.conv(graph, y, weights, "conv3", "bn3")
    shortcut = _shortcut(graph, x, weights, block)
    total = graph.add("Add", "sum", [y.name, shortcut.name])
    return layers.relu(graph, y._replace(name=total))


def _spatial(graph, y, weights, block):
    strides, blur = block["strides"], block["blur"]
    strided = strides > 1
    if block["split_attention"]:
        with graph.scope("split_attention"):
            y = layers.split_attention(
                graph, y, weights["split_attention"], 1 if blur else strides, block["dilation"]
            )
    else:
        if strided and not blur:
            y = layers.average_pool_3x3(graph, y, strides)
        groups = block["cardinality"]
        with graph.scope("cot"):
            y = layers.cot_layer(graph, y, weights["cot"], groups, key_groups_of(groups))
    return layers.blur_pool(graph, y, strides) if strided and blur else y


def _shortcut(graph, x, weights, block):
    if "downsample_conv" not in weights:
        return x
    strides = block["strides"]
    if block["average_down"] and strides > 1:
        x = layers.average_pool_2x2(graph, x, strides)
        strides = 1
    return layers.conv(graph, x, weights, "downsample_conv", "downsample_bn", strides=strides)


def merge(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> layers.Weights:
    """Put each batch norm's running statistics beside its parameters, all in float64."""
    merged = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(params))

    def add(into, inside):
        for name, value in inside.items():
            if isinstance(value, Mapping):
                add(into[name], value)
            else:
                into[name] = np.asarray(value, np.float64)

    add(merged, statistics)
    return merged
