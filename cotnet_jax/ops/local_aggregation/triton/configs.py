"""How the aggregation kernels cut their work up, by shape and size of the dtype."""

import dataclasses
import math
from collections.abc import Mapping

from cotnet_jax.ops.local_aggregation.shapes import AggregationShape


@dataclasses.dataclass(frozen=True)
class AggregationConfig:
    """Configuration of the ``forward`` and ``backward`` kernels.

    Attributes:
      parts: lanes over which the value channels that share a weight are spread.
      rows: rows of the image that a program walks down.
      block: lanes of a program, a power of two.
      num_warps: of 32 threads, for these lanes.
      prefetch: load a row while the one before is computed, at the cost of registers.
      reload: load the normalisation's scale and bias for every row, to save registers; only the
        forward kernel can.
    """

    parts: int
    rows: int
    block: int
    num_warps: int
    prefetch: bool
    reload: bool


@dataclasses.dataclass(frozen=True)
class NormalizationConfig:
    """Configuration of the ``statistics`` and ``group_norm_backward`` kernels.

    Attributes:
      block: values that are read at a time, a power of two.
      num_warps: of 32 threads, for these values.
      num_stages: blocks in shared memory, all but one on their way while it computes.
    """

    block: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class CooperativeConfig:
    """Configuration of the ``cooperative_forward`` and ``cooperative_backward`` kernels.

    Attributes:
      slice: weight channels of a cooperative group, all of an image's or a divisor of a group's.
      rows, block, num_warps, prefetch: as in ``AggregationConfig``.
      resident: programs on a multiprocessor at once; as many cooperative groups as fit on the GPU
        share the images of ``cooperative_backward``.
    """

    slice: int
    rows: int
    block: int
    num_warps: int
    prefetch: bool
    resident: int

    @property
    def parts(self) -> int:
        """A lane has all value channels that share its weight."""
        return 1

    @property
    def reload(self) -> bool:
        """Scale and bias stay in registers."""
        return False

    def programs(self, h: int, w: int) -> int:
        """Return the programs of a cooperative group, for images of h x w pixels."""
        return math.ceil(h / self.rows) * math.ceil(w * self.slice / self.block)


Config = AggregationConfig | NormalizationConfig | CooperativeConfig
# What the configurations are measured for, and their class. The normalised forward kernel and the
# cooperative one are not measured again with the activation, which changes little.
CONFIG_CLASSES: dict[str, type[Config]] = {
    "forward": AggregationConfig,
    "backward": AggregationConfig,
    "normalized_forward": AggregationConfig,
    "normalized_backward": AggregationConfig,
    "statistics": NormalizationConfig,
    "group_norm_backward": NormalizationConfig,
    "cooperative_forward": CooperativeConfig,
    "cooperative_backward": CooperativeConfig,
}
# Cooperative kernels, and the two that do the same one after the other: the one that aggregates,
# and one of the normalisation.
IN_PLACE_OF = {
    "cooperative_forward": ("normalized_forward", "statistics"),
    "cooperative_backward": ("normalized_backward", "group_norm_backward"),
}
# By kernel and key, the fields of ``key_fields``. Cooperative kernels have only the shapes at which
# they are faster.
Table = Mapping[str, Mapping[tuple[int, ...], Config]]


def key_fields(kernel: str) -> tuple[str, ...]:
    """Return the names of what a kernel's configurations are looked up by."""
    if CONFIG_CLASSES[kernel] is NormalizationConfig:
        return ("itemsize", "h", "w", "groups", "channels")
    return ("itemsize", "h", "w", "groups", "share", "channels")


def table_key(kernel: str, itemsize: int, shape: AggregationShape) -> tuple[int, ...]:
    """Return the key of weights of ``itemsize`` bytes and of a shape."""
    return tuple(
        itemsize if name == "itemsize" else getattr(shape, name) for name in key_fields(kernel)
    )


def choose_config(
    table: Table, kernel: str, itemsize: int, shape: AggregationShape
) -> AggregationConfig:
    """Return the measured configuration of a shape, or one after the nearest shape measured.

    Args:
      table: measured configurations.
      kernel: a key of the table, of an ``AggregationConfig``.
      itemsize: bytes of one weight.
      shape: of the aggregation.
    """
    key = table_key(kernel, itemsize, shape)
    config = table[kernel][_nearest(table, kernel, key)]
    if shape.kernel_size == 3 and key in table[kernel]:
        return config
    rows = math.ceil(shape.h / math.ceil(shape.h / config.rows))
    if shape.kernel_size != 3:
        # More taps hold more registers: one weight channel a thread, and nothing loaded ahead.
        config = dataclasses.replace(config, block=32 * config.num_warps, prefetch=False)
    parts = _parts(kernel, config.parts, config.block, shape.share, shape.channels)
    return dataclasses.replace(config, rows=rows, parts=parts)


def choose_normalization_config(
    table: Table, kernel: str, itemsize: int, shape: AggregationShape
) -> NormalizationConfig:
    """As ``choose_config``, for a kernel of the normalisation."""
    config = table[kernel][_nearest(table, kernel, table_key(kernel, itemsize, shape))]
    smallest = smallest_block(kernel, shape.groups, shape.channels, shape.taps)
    if config.block < smallest:
        # Two stages of large blocks still fit into the shared memory.
        return dataclasses.replace(config, block=smallest, num_stages=2)
    return config


def choose_cooperative_config(
    table: Table, kernel: str, multiprocessors: int, itemsize: int, shape: AggregationShape
) -> CooperativeConfig | None:
    """As ``choose_config``, for a cooperative kernel.

    Returns:
      None where two kernels, one after the other, are faster, or were at the nearest shape that
      was measured; and where a cooperative group might not fit on a GPU of so many multiprocessors.
    """
    nearest = _nearest(table, IN_PLACE_OF[kernel][0], table_key(kernel, itemsize, shape))
    if shape.kernel_size != 3 or nearest not in table[kernel]:
        return None
    config = table[kernel][nearest]
    rows = math.ceil(shape.h / math.ceil(shape.h / config.rows))
    config = dataclasses.replace(config, rows=rows)
    if shape.channels % config.slice:
        config = dataclasses.replace(config, slice=shape.groups * shape.channels)
    # Each multiprocessor holds more than one program.
    return config if config.programs(shape.h, shape.w) <= multiprocessors else None


def _nearest(table, kernel, key):
    """Return the key of the table's shape that is nearest to ``key``."""

    def distance(other):
        return sum(abs(math.log2(a / b)) for a, b in zip(key, other, strict=True))

    return min(table[kernel], key=distance)


def smallest_block(kernel: str, groups: int, channels: int, taps: int) -> int:
    """Return the least block: of one run for ``statistics``, otherwise of a pixel's weights."""
    if kernel == "statistics":
        return _power_of_two(run_length(groups, channels, taps))
    return _power_of_two(groups * taps * channels)


def run_length(groups: int, channels: int, taps: int) -> int:
    """Return how many weights ``statistics`` reads in a row, so that a lane keeps its channel.

    With one group and a power of two of channels those of a tap, otherwise all of a pixel and
    group.
    """
    whole = groups == 1 and channels == _power_of_two(channels)
    return channels if whole else taps * channels


def _power_of_two(number):
    """Return ``number`` or the next power of two."""
    return 1 << (number - 1).bit_length()


def possible_parts(kernel: str, parts: int, block: int, share: int, channels: int) -> bool:
    """Return whether ``kernel`` can spread a share over so many lanes."""
    if share % parts:
        return False
    # The backward kernel adds the parts up, in a block reshaped to [.., parts, channels].
    return parts == 1 or "backward" not in kernel or block % (parts * channels) == 0


def _parts(kernel, wanted, block, share, channels):
    """Return the parts nearest to the wanted ones in which a lane has at most 8 channels."""
    possible = [p for p in range(1, share + 1) if possible_parts(kernel, p, block, share, channels)]
    few = [p for p in possible if share / p <= 8] or possible[-1:]
    return min(few, key=lambda p: abs(math.log2(p / wanted)))
