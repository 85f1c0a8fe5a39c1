"""The lanes of the aggregation kernels, and what each reads; importable only where triton is.

A program (CTA) works on a block of lanes. A lane is one element of the block: it owns one weight
channel of one column of one image, and the value channels that share it (DESIGN.md has a drawing).
A tap is one of the K*K positions of a pixel's neighbourhood, in row-major order. Lanes are laid out
flat, weight channel fastest and images end to end, so that no channel count and no width leaves
lanes idle or needs a power of two.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Lanes(NamedTuple):
    """Where each lane of a program is.

    Attributes:
      pixel: its pixel in row 0, counted over all images, int64.
      column, image: its column and image.
      group, channel: its channel group, and its weight channel in the group.
      part: which part of the value channels that share the weight it has.
      inside: whether it exists.
    """

    pixel: tl.tensor
    column: tl.tensor
    image: tl.tensor
    group: tl.tensor
    channel: tl.tensor
    part: tl.tensor
    inside: tl.tensor


class Normalization(NamedTuple):
    """How a weight is normalised: (weight - mean) * rstd * scale + bias.

    Attributes:
      mean, rstd: pointers to the mean and 1 / sqrt(variance + epsilon), [N, G, Cw] float32; or
        their values for each lane.
      scale, bias: pointers to [G, K*K, Cw] float32.
    """

    mean: tl.tensor
    rstd: tl.tensor
    scale: tl.tensor
    bias: tl.tensor


@triton.jit
def locate_program(N, SHAPE, CONFIG, REVERSED):
    """Return the number of the program's block of lanes, and the first of its rows.

    Chunks of rows run fastest, so that neighbouring chunks read their common rows at about the same
    time, through the cache. REVERSED: last images first, which a kernel before has left in the
    cache.
    """
    CHUNKS: tl.constexpr = (SHAPE.h + CONFIG.rows - 1) // CONFIG.rows
    LANES: tl.constexpr = N * SHAPE.w * SHAPE.groups * CONFIG.parts * SHAPE.channels
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    block = program // CHUNKS
    if LANES + CONFIG.block >= 2**31:
        block = block.to(tl.int64)
    return block, (program % CHUNKS) * CONFIG.rows


@triton.jit
def locate_lanes(block, N, SHAPE, PARTS, BLOCK: tl.constexpr):
    """Return the ``Lanes`` of a block of BLOCK lanes, with PARTS lanes for each weight."""
    G: tl.constexpr = SHAPE.groups
    CW: tl.constexpr = SHAPE.channels
    lane = block * BLOCK + tl.arange(0, BLOCK)
    index = lane // (G * PARTS * CW)
    image = index // SHAPE.w
    column = index % SHAPE.w
    pixel = image.to(tl.int64) * (SHAPE.h * SHAPE.w) + column
    group = (lane // (PARTS * CW)) % G
    part = (lane // CW) % PARTS
    return Lanes(pixel, column, image, group, lane % CW, part, index < N * SHAPE.w)


@triton.jit
def near_columns(column, inside, SHAPE):
    """Return for each of K columns around a lane's own whether it lies in the image."""
    K: tl.constexpr = SHAPE.kernel_size
    near = ()
    for j in tl.static_range(K):
        there = inside & (column + (j - K // 2) >= 0) & (column + (j - K // 2) < SHAPE.w)
        near = near + (there,)
    return near


@triton.jit
def load_statistics(pointers, image, group, channel, inside, SHAPE):
    """Return ``pointers`` with each lane's own mean and rstd in place of the pointers to them."""
    index = (image.to(tl.int64) * SHAPE.groups + group) * SHAPE.channels + channel
    mean = tl.load(pointers.mean + index, inside, 0.0)
    rstd = tl.load(pointers.rstd + index, inside, 0.0)
    return Normalization(mean, rstd, pointers.scale, pointers.bias)


@triton.jit
def _tap_of_slot(near, slot, K: tl.constexpr, TURNED: tl.constexpr):
    """Return the tap of a lane's weight, by its row and column as ``weight_slots`` has them."""
    if TURNED and slot % K != K // 2:
        turned = slot // K * K + K - 1 - slot % K
        tap = tl.where(near[K - 1 - slot % K], slot, turned)
    else:
        tap = slot
    return tap


@triton.jit
def normalization_coefficients(normalization, group, channel, near, inside, SHAPE, TURNED):
    """Return a factor and a shift that normalise a weight, for each tap or slot.

    The weight less its mean, times rstd, times scale, plus bias, is the weight times the factor
    plus the shift.
    """
    K: tl.constexpr = SHAPE.kernel_size
    factors = ()
    shifts = ()
    for slot in tl.static_range(K * K):
        tap = _tap_of_slot(near, slot, K, TURNED)
        offset = (group * (K * K) + tap) * SHAPE.channels + channel
        factor = tl.load(normalization.scale + offset, inside, 0.0) * normalization.rstd
        factors = factors + (factor,)
        bias = tl.load(normalization.bias + offset, inside, 0.0)
        shifts = shifts + (bias - normalization.mean * factor,)
    return factors, shifts
