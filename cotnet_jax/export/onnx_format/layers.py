"""The layers of CoTNets as ONNX nodes, in inference, on images [N, C, H, W].

Each function adds the nodes of what it is named after in ``cotnet_jax.layers``. ``weights`` are
those of the module: its parameters and its running statistics, in one nested dict of arrays.
"""

import math
from typing import Any

import numpy as np

from cotnet_jax.export.onnx_format.graph import Features, Graph
from cotnet_jax.layers.batch_norm import BatchNorm
from cotnet_jax.layers.cot import CHANNELS_PER_WEIGHT
from cotnet_jax.layers.group_norm import WeightGroupNorm
from cotnet_jax.models.folding import is_folded

Weights = dict[str, Any]


def conv(
    graph: Graph,
    x: Features,
    weights: Weights,
    name: str,
    norm: str | None = None,
    *,
    strides: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Features:
    """Add the convolution ``name`` and the batch normalisation ``norm`` after it."""
    kernel, bias = weights[name]["kernel"], weights[name].get("bias")
    if norm is not None and is_folded(weights[norm]):
        bias, norm = weights[norm]["bias"] + (0 if bias is None else bias), None
    x = _conv(graph, x, kernel, bias, name, strides, groups, dilation)
    return x if norm is None else batch_norm(graph, x, weights, norm)


def _conv(graph, x, kernel, bias, name, strides=1, groups=1, dilation=1):
    """Add a convolution with a kernel [K, K, in / groups, out]."""
    size = kernel.shape[0]
    constants = {"kernel": kernel.transpose(3, 2, 0, 1)}
    if bias is not None:
        constants["bias"] = bias
    y = graph.add(
        "Conv",
        name,
        [x.name],
        constants,
        kernel_shape=[size, size],
        strides=[strides] * 2,
        pads=[dilation * (size // 2)] * 4,
        dilations=[dilation] * 2,
        group=groups,
    )
    return Features(y, kernel.shape[-1], math.ceil(x.size / strides))


def batch_norm(graph: Graph, x: Features, weights: Weights, name: str) -> Features:
    """Add a batch normalisation by the running statistics."""
    order = ("scale", "bias", "mean", "var")
    constants = {part: weights[name][part] for part in order}
    y = graph.add("BatchNormalization", name, [x.name], constants, epsilon=BatchNorm.epsilon)
    return x._replace(name=y)


def relu(graph: Graph, x: Features) -> Features:
    """Add max(x, 0)."""
    return x._replace(name=graph.add("Relu", "relu", [x.name]))


def silu(graph: Graph, x: Features) -> Features:
    """Add x * sigmoid(x)."""
    gate = graph.add("Sigmoid", "sigmoid", [x.name])
    return x._replace(name=graph.add("Mul", "silu", [x.name, gate]))


def mean_over_pixels(graph: Graph, x: Features) -> Features:
    """Add the mean over rows and columns, [N, C, 1, 1]."""
    return x._replace(name=graph.add("GlobalAveragePool", "mean", [x.name]), size=1)


def max_pool_3x3(graph: Graph, x: Features, strides: int) -> Features:
    return _pool(graph, x, "MaxPool", 3, strides, pads=[1] * 4)


def average_pool_3x3(graph: Graph, x: Features, strides: int) -> Features:
    return _pool(graph, x, "AveragePool", 3, strides, pads=[1] * 4, count_include_pad=1)


def average_pool_2x2(graph: Graph, x: Features, strides: int) -> Features:
    # The last window of an odd side has its pixels inside alone.
    pads = [0, 0, x.size % 2, x.size % 2]
    return _pool(graph, x, "AveragePool", 2, strides, pads=pads, count_include_pad=0)


def _pool(graph, x, operator, window, strides, **attributes):
    y = graph.add(
        operator, "pool", [x.name], kernel_shape=[window] * 2, strides=[strides] * 2, **attributes
    )
    return Features(y, x.channels, math.ceil(x.size / strides))


def blur_pool(graph: Graph, x: Features, strides: int) -> Features:
    # A single pixel has nothing to be mirrored at.
    mode = "reflect" if x.size > 1 else "edge"
    pads = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    padded = graph.add("Pad", "blur_pad", [x.name], pads, mode=mode)
    binomial = np.array([1, 2, 1]) / 4
    kernel = np.broadcast_to(np.outer(binomial, binomial), (x.channels, 1, 3, 3))
    y = graph.add(
        "Conv",
        "blur",
        [padded],
        {"kernel": kernel},
        kernel_shape=[3, 3],
        strides=[strides] * 2,
        group=x.channels,
    )
    return Features(y, x.channels, math.ceil(x.size / strides))


def split_attention(
    graph: Graph, x: Features, weights: Weights, strides: int, dilation: int
) -> Features:
    z = conv(graph, x, weights, "conv", "bn0", strides=strides, dilation=dilation)
    z = silu(graph, z)
    gate = mean_over_pixels(graph, z)
    gate = silu(graph, conv(graph, gate, weights, "fc1", "bn1"))
    gate = conv(graph, gate, weights, "fc2")
    gate_name = graph.add("Sigmoid", "gate", [gate.name])
    return z._replace(name=graph.add("Mul", "gated", [z.name, gate_name]))


def cot_layer(
    graph: Graph, x: Features, weights: Weights, groups: int, key_groups: int
) -> Features:
    static = relu(graph, conv(graph, x, weights, "key_conv", "key_bn", groups=key_groups))
    values = conv(graph, x, weights, "value_conv", "value_bn", groups=groups)
    both = _concatenate(graph, x, static, groups)
    hidden = relu(graph, conv(graph, both, weights, "weight_conv1", "weight_bn", groups=groups))
    dynamic = _aggregate(graph, values, hidden, weights, groups)
    return _fuse(graph, silu(graph, dynamic), static, weights)


def _concatenate(graph, x, static, groups):
    """Concatenate the channels group by group."""
    both = graph.add("Concat", "concat", [x.name, static.name], axis=1)
    channels = x.channels + static.channels
    if groups > 1:
        by_group = np.arange(channels).reshape(2, groups, -1).swapaxes(0, 1).ravel()
        both = graph.add("Gather", "by_group", [both], {"indices": by_group}, axis=1)
    return Features(both, channels, x.size)


def _aggregate(graph, values, hidden, weights, groups):
    """Add the aggregation weights, their group normalisation, the aggregation and ``bn``.

    With normalised weights n, their affine transformation s * n + b, and ``bn`` as m * y + d, the
    result is m * (sum over taps of s * (n * value) + sum over taps of b * value) + d. The second
    sum is one tap more, whose neighbour is the convolution of the values with b and whose weight
    is 1. Neighbours come from a convolution, and the sum with s, m and d is one, too.
    """
    channels, size = values.channels, values.size
    kernel = weights["weight_conv2"]["kernel"]
    taps = kernel.shape[-1] * CHANNELS_PER_WEIGHT // channels
    weight_channels = channels // CHANNELS_PER_WEIGHT // groups

    def by_channel(array):
        """Put taps behind channels: [..., groups * taps * Cw] -> [..., groups, Cw, taps]."""
        return array.reshape(*array.shape[:-1], groups, taps, weight_channels).swapaxes(-2, -1)

    def with_ones(array):
        """Append a channel of zeros to each group's, where the weights of 1 are to be."""
        padding = [(0, 0)] * (array.ndim - 2) + [(0, 1), (0, 0)]
        return np.pad(array, padding).reshape(*array.shape[:-3], -1)

    def per_value(array):
        """Repeat what channels share: [groups, Cw, taps] -> [channels, taps]."""
        return array[:, None].repeat(CHANNELS_PER_WEIGHT, axis=1).reshape(channels, -1)

    raw = _conv(
        graph,
        hidden,
        with_ones(by_channel(kernel)),
        with_ones(by_channel(weights["weight_conv2"]["bias"])),
        "weight_conv2",
        groups=groups,
    )
    shape = np.array([0, groups * (weight_channels + 1), taps * size * size])
    raw_name = graph.add("Reshape", "weight_groups", [raw.name], {"shape": shape})
    ones = np.tile(np.eye(weight_channels + 1)[-1], groups)
    normalized = graph.add(
        "InstanceNormalization",
        "weight_norm",
        [raw_name],
        {"scale": 1 - ones, "bias": ones},
        epsilon=WeightGroupNorm.epsilon,
    )
    shape = np.array([0, raw.channels, size, size])
    normalized = graph.add("Reshape", "weights", [normalized], {"shape": shape})
    numbers = np.arange(raw.channels).reshape(groups, weight_channels + 1, taps)
    numbers = np.insert(numbers[:, :-1], taps, numbers[:, -1:, 0], axis=2)
    indices = {"indices": per_value(numbers).ravel()}
    normalized = graph.add("Gather", "shared_weights", [normalized], indices, axis=1)

    scale, bias = (per_value(by_channel(weights["weight_norm"][p])) for p in ("scale", "bias"))
    windows = np.insert(np.tile(np.eye(taps), (channels, 1, 1)), taps, bias, axis=1)
    side = math.isqrt(taps)
    windows = windows.reshape(-1, 1, side, side).transpose(2, 3, 1, 0)
    neighbours = _conv(graph, values, windows, None, "neighbours", groups=channels)
    products = graph.add("Mul", "products", [neighbours.name, normalized])

    bn = weights["bn"]
    multiplier = bn["scale"] / np.sqrt(bn["var"] + BatchNorm.epsilon)
    factors = np.insert(scale, taps, 1, axis=1) * multiplier[:, None]
    return _conv(
        graph,
        neighbours._replace(name=products),
        factors.T[None, None],
        bn["bias"] - bn["mean"] * multiplier,
        "aggregation",
        groups=channels,
    )


def _fuse(graph, dynamic, static, weights):
    """Mix the contexts. A softmax over two is the sigmoid of their difference."""
    both = graph.add("Add", "contexts", [dynamic.name, static.name])
    hidden = mean_over_pixels(graph, static._replace(name=both))
    hidden = relu(graph, conv(graph, hidden, weights, "fusion_conv1", "fusion_bn"))
    kernel, bias = (weights["fusion_conv2"][part] for part in ("kernel", "bias"))
    logit = _conv(
        graph,
        hidden,
        kernel[..., 0::2] - kernel[..., 1::2],
        bias[0::2] - bias[1::2],
        "fusion_conv2",
    )
    share = graph.add("Sigmoid", "dynamic_share", [logit.name])
    difference = graph.add("Sub", "difference", [dynamic.name, static.name])
    part = graph.add("Mul", "dynamic_part", [difference, share])
    return static._replace(name=graph.add("Add", "fusion", [static.name, part]))
