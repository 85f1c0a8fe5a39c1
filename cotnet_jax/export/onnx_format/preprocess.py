"""Resizing, cropping and normalising as ONNX nodes."""

from typing import Any

import numpy as np
import onnx

from cotnet_jax.export.onnx_format.graph import Features, Graph
from cotnet_jax.export.options import Preparation

# Of Pillow's filters: its bicubic one is Keys' with a = -0.5.
_FILTERS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
    "bilinear": {"mode": "linear"},
}


def resize_and_crop(graph: Graph, images: str, pixels: str, preparation: Preparation) -> str:
    """Add what ``data.transforms.eval_transform`` does, and return the result's name.

    Args:
      images: name of the input, uint8 [N, H, W, 3].
      pixels: name of the same, [N, 3, H, W].
    """
    size = preparation.image_size
    with graph.scope("resize"):
        height_width = graph.add("Shape", "height_width", [images], start=1, end=3)
        short = graph.add("ReduceMin", "short_side", [height_width], keepdims=1)
        scaled = graph.add("Mul", "scaled", [height_width], {"short": _int(preparation.short_side)})
        # Both are positive: the quotient is rounded down.
        resized = graph.add("Div", "resized_sides", [scaled, short])
        # All four axes: ONNX Runtime 1.32 loses count where the attribute "axes" names two.
        batch_channels = graph.add("Shape", "batch_channels", [pixels], start=0, end=2)
        sizes = graph.add("Concat", "sizes", [batch_channels, resized], axis=0)
        pixels = graph.add(
            "Resize",
            "resize",
            [pixels, "", "", sizes],
            antialias=1,
            coordinate_transformation_mode="half_pixel",
            exclude_outside=1,
            **_FILTERS[preparation.interpolation],
        )
    with graph.scope("crop"):
        margin = graph.add("Sub", "margins", [resized], {"size": _int(size)})
        margin = graph.add("Cast", "margins_float", [margin], to=onnx.TensorProto.FLOAT)
        half = graph.add("Mul", "halves", [margin], {"half": np.array([0.5])})
        # Half a pixel goes to the even side, as in Python.
        first = graph.add("Round", "rounded", [half])
        first = graph.add("Cast", "first", [first], to=onnx.TensorProto.INT64)
        last = graph.add("Add", "last", [first], {"size": _int(size)})
        return graph.add("Slice", "crop", [pixels, first, last], {"axes": np.array([2, 3])})


def normalize(graph: Graph, pixels: str, preparation: Preparation) -> Features:
    """Add the conversion of uint8 [N, 3, size, size] to float32, and the normalisation."""
    mean, std = (
        255 * np.array(values, np.float64).reshape(3, 1, 1)
        for values in (preparation.mean, preparation.std)
    )
    x = graph.add("Cast", "float", [pixels], to=onnx.TensorProto.FLOAT)
    x = graph.add("Sub", "centred", [x], {"mean": mean})
    x = graph.add("Div", "normalized", [x], {"std": std})
    return Features(x, 3, preparation.image_size)


def _int(value):
    return np.array([value], np.int64)
