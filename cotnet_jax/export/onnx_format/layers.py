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
    names = [x.name, static.name]
    if groups > 1:
        shape = {"shape": np.array([0, groups, x.channels // groups, x.size, x.size])}
        names = [graph.add("Reshape", "by_group", [name], shape) for name in names]
    both = graph.add("Concat", "concat", names, axis=1 if groups == 1 else 2)
    channels = x.channels + static.channels
    if groups > 1:
        shape = {"shape": np.array([0, channels, x.size, x.size])}
        both = graph.add("Reshape", "concat", [both], shape)
    return Features(both, channels, x.size)


def _aggregate(graph, values, hidden, weights, groups):
    """Add the aggregation weights, their group normalisation, the aggregation and ``bn``.

    With normalised weights n and their affine transformation s * n + b, the sum over taps of
    (s * n + b) * value is that of n * (s * value), plus a convolution of the values with b. The
    values of all taps, times s, come from one convolution too, whose kernels have one entry each.
    """
    channels, size = values.channels, values.size
    kernel = weights["weight_conv2"]["kernel"]
    taps = kernel.shape[-1] * CHANNELS_PER_WEIGHT // channels
    weight_channels = channels // CHANNELS_PER_WEIGHT // groups

    def tap_last(array):
        """Put the taps behind the channels that they belong to: [..., groups * Cw * taps]."""
        split = array.reshape(*array.shape[:-1], groups, taps, weight_channels)
        return split.swapaxes(-2, -1).reshape(array.shape)

    def per_value(array):
        """[groups * taps * Cw] -> [K, K, channels], what is shared repeated."""
        split = array.reshape(groups, 1, taps, weight_channels)
        split = np.broadcast_to(split, (groups, CHANNELS_PER_WEIGHT, taps, weight_channels))
        side = math.isqrt(taps)
        return split.transpose(2, 0, 1, 3).reshape(side, side, channels)

    raw = _conv(
        graph,
        hidden,
        tap_last(kernel),
        tap_last(weights["weight_conv2"]["bias"]),
        "weight_conv2",
        groups=groups,
    )
    shape = np.array([0, groups * weight_channels, taps * size * size])
    raw_name = graph.add("Reshape", "weight_groups", [raw.name], {"shape": shape})
    ones = np.ones(groups * weight_channels)
    normalized = graph.add(
        "InstanceNormalization",
        "weight_norm",
        [raw_name],
        {"scale": ones, "bias": 0 * ones},
        epsilon=WeightGroupNorm.epsilon,
    )
    shape = np.array([0, groups, 1, weight_channels, taps, size * size])
    normalized = graph.add("Reshape", "weights", [normalized], {"shape": shape})

    scale, bias = (per_value(weights["weight_norm"][part]) for part in ("scale", "bias"))
    windows = np.zeros((*scale.shape, taps))
    for tap, (row, column) in enumerate(np.ndindex(scale.shape[:2])):
        windows[row, column, :, tap] = scale[row, column]
    windows = windows.reshape(*scale.shape[:2], 1, channels * taps)
    neighbours = _conv(graph, values, windows, None, "neighbours", groups=channels)
    shape = np.array([0, groups, CHANNELS_PER_WEIGHT, weight_channels, taps, size * size])
    neighbours_name = graph.add("Reshape", "neighbours_by_tap", [neighbours.name], {"shape": shape})
    products = graph.add("Mul", "products", [neighbours_name, normalized])
    total = graph.add("ReduceSum", "aggregation", [products], {"axes": np.array([4])}, keepdims=0)
    shape = np.array([0, channels, size, size])
    total = graph.add("Reshape", "aggregation", [total], {"shape": shape})

    folded = is_folded(weights["bn"])
    shift = weights["bn"]["bias"] if folded else None
    constant = _conv(graph, values, bias[:, :, None], shift, "aggregation_bias", groups=channels)
    y = values._replace(name=graph.add("Add", "aggregation_sum", [total, constant.name]))
    return y if folded else batch_norm(graph, y, weights, "bn")


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
