"""Draw the pictures of docs/cot_layer.md with matplotlib: ``make drawings``.

python docs/draw_cot_layer.py --output=docs/pictures
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# Arrays have the colour of their branch, steps are white.
STATIC, WEIGHTS, VALUES, DYNAMIC, OTHER = "#d3e4f4", "#fcdfc0", "#d8edd3", "#f6d2d2", "#e6e6e6"
LINE = "#444444"
# One for each set of weights.
SETS = ("#9ec3e6", "#f9b97c", "#9fd39a", "#d5b3d9")
CHANNELS_PER_SET = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    # The same picture is the same file: neither a date nor random names in it.
    matplotlib.rcParams["svg.hashsalt"] = "cotnet_jax"
    for name, draw in (("cot_layer", draw_layer), ("shared_weights", draw_sharing)):
        draw().savefig(output / f"{name}.svg", metadata={"Date": None})


def draw_layer() -> Figure:
    """Draw the steps of the layer from top to bottom, with the shape of every array."""
    figure, axes = canvas(10, 9.4)
    left, middle, right = 1.5, 5.0, 8.5
    x = box(axes, middle, 9.0, "input x\n[N, H, W, C]", OTHER)
    key = box(axes, left, 7.9, "3x3 convolution, 4 groups\nBatchNorm, ReLU")
    static = box(axes, left, 6.9, "static context\n[N, H, W, C]", STATIC)
    both = box(axes, middle, 6.9, "concatenate channels\nx | static")
    hidden = box(axes, middle, 5.75, "1x1 convolution\nBatchNorm, ReLU")
    weights_conv = box(axes, middle, 4.6, "1x1 convolution with bias\nGroupNorm, C/8 groups")
    weights = box(axes, middle, 3.6, "weights of each pixel\n[N, H, W, 3x3, C/8]", WEIGHTS)
    value_conv = box(axes, right, 7.9, "1x1 convolution\nBatchNorm")
    values = box(axes, right, 6.9, "values\n[N, H, W, C]", VALUES)
    aggregation = box(axes, right, 3.6, "local aggregation, that is\nweighted sum of 3x3 values")
    activation = box(axes, right, 2.6, "BatchNorm\nSiLU")
    dynamic = box(axes, right, 1.6, "dynamic context\n[N, H, W, C]", DYNAMIC)
    pooled = box(axes, middle, 2.4, "mean of static + dynamic\nover all pixels", width=2.5)
    share = box(axes, middle, 1.4, "two 1x1 convolutions, softmax\nshare [N, 1, 1, C]", OTHER)
    output = box(
        axes,
        middle,
        0.4,
        "output [N, H, W, C] =\nshare * dynamic + (1 - share) * static",
        OTHER,
        width=3.4,
    )

    for target in (key, value_conv):
        elbow(axes, (x.left if target is key else x.right, x.y), (target.x, x.y), target.above)
    for start, end in (
        (x.below, both.above),
        (key.below, static.above),
        (value_conv.below, values.above),
        ((static.right, static.y), (both.left, both.y)),
        (weights_conv.below, weights.above),
        (values.below, aggregation.above),
        ((weights.right, weights.y), (aggregation.left, aggregation.y)),
        (aggregation.below, activation.above),
        (activation.below, dynamic.above),
        (pooled.below, share.above),
        (share.below, output.above),
    ):
        elbow(axes, start, end)
    elbow(axes, both.below, hidden.above, label="[N, H, W, 2C]")
    elbow(axes, hidden.below, weights_conv.above, label="[N, H, W, C/2]")
    # Both contexts go to their mean and to the output.
    elbow(axes, static.below, (left, output.y), (output.left, output.y))
    elbow(axes, (left, pooled.y), (pooled.left, pooled.y))
    beside = (dynamic.left + pooled.right) / 2
    elbow(
        axes,
        (dynamic.left, dynamic.y),
        (beside, dynamic.y),
        (beside, pooled.y),
        (pooled.right, pooled.y),
    )
    elbow(axes, dynamic.below, (right, output.y), (output.right, output.y))
    return figure


def draw_sharing() -> Figure:
    """Draw which channels share weights, for C = 32, and the sum of one channel at one pixel."""
    figure, axes = canvas(10, 3.6)
    sets = len(SETS)
    channels = CHANNELS_PER_SET * sets
    side = 9.6 / channels
    title(axes, 0.2, 3.3, f"values: C = {channels} channels")
    for channel in range(channels):
        grid(axes, 0.2 + channel * side, 3.15, side, SETS[channel % sets], [[channel]])
    note = f"channel c uses set c mod {sets}, so that {CHANNELS_PER_SET} channels share a set"
    axes.text(0.2, 2.6, note, fontsize=10.5)

    title(axes, 0.2, 2.05, f"weights of one pixel: C/8 = {sets} sets of 3x3")
    weights = [[f"w{3 * row + column}" for column in range(3)] for row in range(3)]
    for index, colour in enumerate(SETS):
        left = 0.2 + 1.3 * index
        grid(axes, left, 1.9, 0.36, colour, weights)
        axes.text(left + 0.54, 0.6, f"set {index}", fontsize=10, ha="center")

    chosen = 9
    title(axes, 6.3, 2.05, f"channel {chosen} at that pixel")
    around = [[f"v{3 * row + column}" for column in range(3)] for row in range(3)]
    grid(axes, 6.3, 1.9, 0.36, SETS[chosen % sets], weights)
    axes.text(7.6, 1.32, "*", fontsize=18, ha="center", va="center")
    grid(axes, 7.8, 1.9, 0.36, VALUES, around)
    axes.text(6.84, 0.6, f"set {chosen} mod {sets} = {chosen % sets}", fontsize=10, ha="center")
    axes.text(8.34, 0.6, "values around it", fontsize=10, ha="center")
    result = "before BatchNorm and SiLU:  w0 v0 + w1 v1 + ... + w8 v8;  outside of the image v is 0"
    axes.text(9.8, 0.15, result, fontsize=10.5, ha="right")
    return figure


class Box(NamedTuple):
    """A drawn box: its centre and half its size, in inches."""

    x: float
    y: float
    half_width: float
    half_height: float

    @property
    def left(self) -> float:
        return self.x - self.half_width

    @property
    def right(self) -> float:
        return self.x + self.half_width

    @property
    def above(self) -> tuple[float, float]:
        return self.x, self.y + self.half_height

    @property
    def below(self) -> tuple[float, float]:
        return self.x, self.y - self.half_height


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return axes whose unit is an inch, without ticks and frame."""
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, content: str, colour: str = "white", width: float = 2.5
) -> Box:
    """Draw an array, in its colour, or a step, in white with a dashed frame."""
    drawn = Box(x, y, width / 2, 0.3)
    axes.add_patch(
        FancyBboxPatch(
            (drawn.left, y - drawn.half_height),
            width,
            2 * drawn.half_height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colour,
            edgecolor=LINE,
            linestyle="--" if colour == "white" else "-",
        )
    )
    axes.text(x, y, content, ha="center", va="center", fontsize=10.5, linespacing=1.35)
    return drawn


def elbow(axes: Axes, *points: tuple[float, float], label: str = "") -> None:
    """Draw a line through the points, with an arrow head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=LINE, linewidth=1)
    head = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=head)
    if label:
        (x, start), (_, end) = points
        axes.text(x + 0.12, (start + end) / 2, label, fontsize=9.5, va="center")


def grid(axes: Axes, left: float, top: float, side: float, colour: str, cells: list[list]) -> None:
    """Draw square cells with their texts, the first row at the top."""
    for row, texts in enumerate(cells):
        for column, text in enumerate(texts):
            corner = (left + column * side, top - (row + 1) * side)
            axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="white"))
            centre = (corner[0] + side / 2, corner[1] + side / 2)
            axes.text(*centre, text, ha="center", va="center", fontsize=9)


def title(axes: Axes, x: float, y: float, content: str) -> None:
    axes.text(x, y, content, fontsize=11.5, weight="bold")


if __name__ == "__main__":
    main()
