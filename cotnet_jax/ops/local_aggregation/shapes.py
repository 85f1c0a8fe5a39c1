"""The sizes of an aggregation, and those that the published models have."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax


class AggregationShape(NamedTuple):
    """The sizes of an aggregation but for the number of images.

    Attributes:
      h, w: rows and columns of an image.
      groups: channel groups G.
      share: channels S of the values in a group that share one weight.
      channels: weight channels Cw of a group.
      kernel_size: K, odd.
    """

    h: int
    w: int
    groups: int
    share: int
    channels: int
    kernel_size: int = 3

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> AggregationShape:
        """Return the sizes of values [N, H, W, C] and weights [N, H, W, G, K*K, Cw]."""
        _, h, w, groups, taps, channels = weights.shape
        share = values.shape[-1] // (groups * channels)
        return cls(h, w, groups, share, channels, math.isqrt(taps))

    @property
    def taps(self) -> int:
        """Positions of the neighbourhood, K*K."""
        return self.kernel_size**2

    @property
    def pixel_values(self) -> int:
        """Values of a pixel, C."""
        return self.groups * self.share * self.channels

    @property
    def pixel_weights(self) -> int:
        """Weights of a pixel, G * K*K * Cw."""
        return self.groups * self.taps * self.channels

    def __str__(self) -> str:
        return f"{self.h}x{self.w}x{self.pixel_values}, {self.groups} group{'s'[: self.groups > 1]}"


def _stages(*sizes_groups_channels):
    return tuple(AggregationShape(size, size, g, 8, c) for size, g, c in sizes_groups_channels)


# The CoT layers' sizes by model, at its input size, but for those of se_cotnetd's blocks that
# shrink the image. Variants that differ in depth alone have the same sizes.
MODEL_SHAPES = {
    "cotnet50": _stages((56, 1, 8), (28, 1, 16), (14, 1, 32), (7, 1, 64)),
    "cotnext50_2x48d": _stages((56, 2, 6), (28, 2, 12), (14, 2, 24), (7, 2, 48)),
    "se_cotnetd_152": _stages((16, 1, 32), (8, 1, 64)),
    "se_cotnetd_152_L": _stages((20, 1, 32), (10, 1, 64)),
}
SHAPES = tuple(shape for stages in MODEL_SHAPES.values() for shape in stages)
