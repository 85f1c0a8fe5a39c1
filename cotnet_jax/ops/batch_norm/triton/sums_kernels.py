"""Triton kernels of the sums that batch normalisation takes; importable only where triton is.

Arrays are [ROWS, C], the channels of all pixels of a batch. A program has a block of the channels
and every SLOTS-th block of the rows, and leaves partial sums, [SLOTS, 2, C] float32. Everything is
computed in float32.
"""

import triton
import triton.language as tl

# Blocks of rows that are on their way while one is added.
STAGES = tl.constexpr(2)


@triton.jit
def channel_sums(
    x_ptr,
    sums_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the sums of x and of its squares."""
    slot, row, channel = _place(C, BLOCK_ROWS, BLOCK_C)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for first in tl.range(slot * BLOCK_ROWS, ROWS, SLOTS * BLOCK_ROWS, num_stages=STAGES):
        offset, mask = _block(first, row, channel, ROWS, C)
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        total += x
        square += x * x
    _store_sums(sums_ptr, slot, channel, total, square, C)


@triton.jit
def backward_sums(
    gradient_ptr,
    x_ptr,
    mean_ptr,
    multiplier_ptr,
    bias_ptr,
    sums_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Write the sums of g and of g * (x - mean).

    g is the gradient times the activation's derivative at (x - mean) * multiplier + bias.
    """
    slot, row, channel = _place(C, BLOCK_ROWS, BLOCK_C)
    mean = tl.load(mean_ptr + channel, channel < C, 0.0)[None, :]
    multiplier = tl.load(multiplier_ptr + channel, channel < C, 0.0)[None, :]
    bias = tl.load(bias_ptr + channel, channel < C, 0.0)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for first in tl.range(slot * BLOCK_ROWS, ROWS, SLOTS * BLOCK_ROWS, num_stages=STAGES):
        offset, mask = _block(first, row, channel, ROWS, C)
        g = tl.load(gradient_ptr + offset, mask, 0.0).to(tl.float32)
        centred = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32) - mean
        g = times_slope(g, centred * multiplier + bias, ACTIVATION)
        total += g
        product += g * centred
    _store_sums(sums_ptr, slot, channel, total, product, C)


@triton.jit
def residual_backward_sums(
    gradient_ptr,
    x_ptr,
    output_ptr,
    mean_ptr,
    branch_scale_ptr,
    sums_ptr,
    masked_ptr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PIXELS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Write the gradient where the output is positive, and sums as ``backward_sums``.

    g is that masked gradient, with SCALED times the branch scale of its image; an image has PIXELS
    rows.
    """
    slot, row, channel = _place(C, BLOCK_ROWS, BLOCK_C)
    mean = tl.load(mean_ptr + channel, channel < C, 0.0)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for first in tl.range(slot * BLOCK_ROWS, ROWS, SLOTS * BLOCK_ROWS, num_stages=STAGES):
        offset, mask = _block(first, row, channel, ROWS, C)
        g = tl.load(gradient_ptr + offset, mask, 0.0)
        centred = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32) - mean
        g = tl.where(tl.load(output_ptr + offset, mask, 0.0) > 0, g, 0.0)
        tl.store(masked_ptr + offset, g, mask)
        g = g.to(tl.float32)
        if SCALED:
            image = (first + row) // PIXELS
            g *= tl.load(branch_scale_ptr + image, first + row < ROWS, 0.0)[:, None]
        total += g
        product += g * centred
    _store_sums(sums_ptr, slot, channel, total, product, C)


@triton.jit
def times_slope(g, z, ACTIVATION: tl.constexpr):
    """Return g times the derivative of the activation at z."""
    if ACTIVATION == "relu":
        g = tl.where(z > 0, g, 0.0)
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        g *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return g


@triton.jit
def _place(C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's slot, the rows of a block, and the channels."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // BLOCKS, tl.arange(0, BLOCK_ROWS), channel


@triton.jit
def _block(first, row, channel, ROWS: tl.constexpr, C: tl.constexpr):
    """Return the offsets of the block of rows from the first, 64 bits wide, and its mask."""
    offset = tl.cast(first, tl.int64) * C + (row[:, None] * C + channel[None, :])
    return offset, (first + row < ROWS)[:, None] & (channel < C)[None, :]


@triton.jit
def _store_sums(sums_ptr, slot, channel, first, second, C: tl.constexpr):
    place = sums_ptr + slot * (2 * C) + channel
    tl.store(place, tl.sum(first, 0), channel < C)
    tl.store(place + C, tl.sum(second, 0), channel < C)
