"""How the aggregation kernels cut their work up, by shape and size of the dtype."""

import dataclasses
import math

from cotnet_jax.ops.local_aggregation.triton.tuned_h100 import TABLE

# An activation changes little: these kernels are not measured apart.
MEASURED_AS = {
    "activated_forward": "normalized_forward",
    "team_activated_forward": "team_forward",
}
# Kernels that normalise and aggregate, and the two that do the same one after the other: the one
# that aggregates, and one of the normalisation.
IN_PLACE_OF = {
    "team_forward": ("normalized_forward", "statistics"),
    "team_backward": ("normalized_backward", "group_norm_backward"),
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's share of the work.

    Attributes:
      parts: lanes over which the channels that share a weight are spread.
      rows: rows of the picture that a program walks down.
      block: lanes of a program times the weight channels in each, a power of two.
      warps: of 32 threads, for these lanes.
      prefetch: load a row while the one before is computed, at the cost of registers.
      reload: load the normalisation's scale and bias for every row, to save registers; only the
        forward kernels can.
    """

    parts: int
    rows: int
    block: int
    warps: int
    prefetch: bool
    reload: bool


def choose_tile(
    kernel: str, itemsize: int, h: int, w: int, groups: int, share: int, channels: int, taps: int
) -> Tile:
    """The measured tile of these shapes, or one after the nearest shape that was measured.

    Args:
      kernel: name of the function in ``aggregation_kernels``.
      itemsize: bytes of one weight.
      h, w, groups, channels, taps: of weights [N, H, W, G, K*K, Cw].
      share: channels of the values to one of the weights.
    """
    kernel = MEASURED_AS.get(kernel, kernel)
    key = (itemsize, h, w, groups, share, channels)
    tile = Tile(*TABLE[kernel][_nearest(kernel, key)])
    if taps == 9 and key in TABLE[kernel]:
        return tile
    rows = math.ceil(h / math.ceil(h / tile.rows))
    if taps != 9:
        # More taps hold more registers: one weight channel a thread, and nothing loaded ahead.
        tile = dataclasses.replace(tile, block=32 * tile.warps, prefetch=False)
    return dataclasses.replace(
        tile, rows=rows, parts=_parts(kernel, tile.parts, tile.block, share, channels)
    )


@dataclasses.dataclass(frozen=True)
class NormTile:
    """A program's share of the normalisation's work.

    Attributes:
      block: values that are read at a time, a power of two.
      warps: of 32 threads, for these values.
      stages: blocks in shared memory, all but one on their way while it computes.
    """

    block: int
    warps: int
    stages: int


def choose_norm_tile(
    kernel: str, itemsize: int, h: int, w: int, groups: int, channels: int, taps: int
) -> NormTile:
    """As ``choose_tile``, for the kernels in ``group_norm_kernels``."""
    tile = NormTile(*TABLE[kernel][_nearest(kernel, (itemsize, h, w, groups, channels))])
    smallest = smallest_block(kernel, groups, channels, taps)
    if tile.block < smallest:
        # Two stages of large blocks still fit into the shared memory.
        return dataclasses.replace(tile, block=smallest, stages=2)
    return tile


@dataclasses.dataclass(frozen=True)
class TeamTile:
    """One program's share of the work of the kernels in ``cooperative_kernels``.

    Attributes:
      slice: weight channels of a team, all of a picture's or a divisor of a group's.
      rows, block, warps, prefetch: as in ``Tile``.
      resident: programs on a multiprocessor at once; as many teams as fit on the GPU share the
        pictures of ``team_backward``.
    """

    slice: int
    rows: int
    block: int
    warps: int
    prefetch: bool
    resident: int

    def members(self, h: int, w: int) -> int:
        """Programs of a team, for pictures of h x w pixels."""
        return math.ceil(h / self.rows) * math.ceil(w * self.slice / self.block)


def choose_team_tile(
    kernel: str,
    multiprocessors: int,
    itemsize: int,
    h: int,
    w: int,
    groups: int,
    share: int,
    channels: int,
    taps: int,
) -> TeamTile | None:
    """As ``choose_tile``, for the kernels in ``cooperative_kernels``.

    Returns:
      None where two kernels, one after the other, are faster, or were at the nearest shape that
      was measured; and where a team might not fit on a GPU of so many multiprocessors.
    """
    kernel = MEASURED_AS.get(kernel, kernel)
    key = (itemsize, h, w, groups, share, channels)
    nearest = _nearest(IN_PLACE_OF[kernel][0], key)
    if taps != 9 or nearest not in TABLE[kernel]:
        return None
    tile = TeamTile(*TABLE[kernel][nearest])
    tile = dataclasses.replace(tile, rows=math.ceil(h / math.ceil(h / tile.rows)))
    if channels % tile.slice:
        tile = dataclasses.replace(tile, slice=groups * channels)
    # Each multiprocessor holds more than one program.
    return tile if tile.members(h, w) <= multiprocessors else None


def _nearest(kernel, key):
    """The key of the table's shape that is nearest to ``key``."""

    def distance(other):
        return sum(abs(math.log2(a / b)) for a, b in zip(key, other, strict=True))

    return min(TABLE[kernel], key=distance)


def smallest_block(kernel: str, groups: int, channels: int, taps: int) -> int:
    """The least block: of one run for ``statistics``, otherwise of all weights of a pixel."""
    if kernel == "statistics":
        return _power_of_two(run_length(groups, channels, taps))
    return _power_of_two(groups * taps * channels)


def run_length(groups: int, channels: int, taps: int) -> int:
    """Weights that ``statistics`` reads in a row, so that a lane keeps its channel: with one group
    and a power of two of channels those of a tap, otherwise all of a pixel and group."""
    whole = groups == 1 and channels == _power_of_two(channels)
    return channels if whole else taps * channels


def _power_of_two(number):
    """``number`` or the next power of two."""
    return 1 << (number - 1).bit_length()


def possible_parts(kernel: str, parts: int, block: int, share: int, channels: int) -> bool:
    """Whether ``kernel`` can spread a share over so many lanes."""
    if share % parts:
        return False
    # The backward kernels add the parts up, in a block reshaped to [.., parts, channels].
    return parts == 1 or "backward" not in kernel or block % (parts * channels) == 0


def _parts(kernel, wanted, block, share, channels):
    """The number of parts nearest to the wanted one in which a lane has at most 8 channels."""
    possible = [p for p in range(1, share + 1) if possible_parts(kernel, p, block, share, channels)]
    few = [p for p in possible if share / p <= 8] or possible[-1:]
    return min(few, key=lambda p: abs(math.log2(p / wanted)))
