"""Triton kernels that normalise the weights of an image and aggregate with them at once, by
programs that cooperate; importable only where triton is.

Normalisation needs sums over a whole image before the first weight, or its gradient, can be
normalised. Here a cooperative group of PROGRAMS programs (CTAs) has a slice of an image's weight
channels; the program of each rank has a block of lanes of its columns and a chunk of its rows. A
program reads its weights, or computes their gradients, once, and keeps them in shared memory; it
gives its partial sums to the group, waits for those of the others, and goes on with what it kept.
So every array is read or written once.

All programs of a group must be resident on the GPU at once, or they wait for ever: DESIGN.md says
what that rests on, and how to turn these kernels off.

Lanes and shapes are those of ``lanes`` and ``forward_kernel``, but lanes are of one slice and have
all value channels of a weight; values and weights have 16 bits. A slice has all G * Cw weight
channels, or a divisor of Cw of them. ``sums`` are partial sums, [N * slices, PROGRAMS, 2, slice]
float32, the slice padded to a power of two; the first of each slice's ``arrived`` [N * slices, 32]
int32 counts the programs that have written theirs. It is zero at the start. (A cache line each:
many programs wait for different slices.) A group of one needs neither.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from cotnet_jax.ops.local_aggregation.triton.backward_kernel import (
    BackwardPointers,
    WeightNormalization,
    walk_backward,
    weight_slots,
)
from cotnet_jax.ops.local_aggregation.triton.forward_kernel import (
    ForwardPointers,
    Kept,
    keep_weights,
    load_values,
    walk_forward,
)
from cotnet_jax.ops.local_aggregation.triton.lanes import (
    Lanes,
    Normalization,
    load_statistics,
    near_columns,
    normalization_coefficients,
)
from cotnet_jax.ops.local_aggregation.triton.shared_memory import allocate, get, put, unpack

# Partial sums that a program reads at a time.
READ_AT_ONCE = tl.constexpr(512)
# Counters of arrivals for a slice, of which the first is used.
ARRIVED_STRIDE = tl.constexpr(32)


class Place(NamedTuple):
    """A program's place in the grid.

    Attributes:
      group: number of its cooperative group.
      rank: its number in the group.
      first: the first of its rows.
      start: the first of its lanes, among those of the slice.
    """

    group: tl.tensor
    rank: tl.tensor
    first: tl.tensor
    start: tl.tensor


@triton.jit
def _locate_program(PROGRAMS, SHAPE, CONFIG):
    """Return the program's ``Place``."""
    CHUNKS: tl.constexpr = (SHAPE.h + CONFIG.rows - 1) // CONFIG.rows
    rank = tl.program_id(0) % PROGRAMS
    group = tl.program_id(0) // PROGRAMS
    return Place(group, rank, (rank % CHUNKS) * CONFIG.rows, rank // CHUNKS * CONFIG.block)


@triton.jit
def _locate_lanes(index, start, SHAPE, SLICE, BLOCK: tl.constexpr):
    """Return image of slice ``index``, and column, group and weight channel of each lane, and
    whether it exists."""
    CW: tl.constexpr = SHAPE.channels
    G: tl.constexpr = SHAPE.groups
    lane = start + tl.arange(0, BLOCK)
    column = lane // SLICE
    if SLICE == G * CW:
        image = index
        group = lane // CW % G
        channel = lane % CW
    else:
        EACH: tl.constexpr = CW // SLICE
        image = index // (G * EACH)
        group = index // EACH % G
        # So written the compiler knows that it starts at a multiple, and reads several at once.
        channel = index % EACH * SLICE + lane % SLICE
    return image, column, group, channel, column < SHAPE.w


@triton.jit
def _by_channel(values, start, SLICE: tl.constexpr, BLOCK: tl.constexpr):
    """Return sums over the lanes that have the same group and weight channel, [SLICE padded]."""
    PADDED: tl.constexpr = triton.next_power_of_2(SLICE)
    channel = tl.arange(0, PADDED)
    first = (channel + SLICE - start % SLICE) % SLICE
    total = tl.zeros((PADDED,), tl.float32)
    for i in tl.static_range((BLOCK + SLICE - 1) // SLICE):
        lane = first + i * SLICE
        there = (lane < BLOCK) & (channel < SLICE)
        total += tl.where(there, tl.gather(values, tl.minimum(lane, BLOCK - 1), 0), 0.0)
    return total


@triton.jit
def _wait(arrived, PROGRAMS):
    """Return when all programs have arrived, and what they wrote before can be read."""
    while tl.load(arrived, volatile=True) < PROGRAMS:
        pass
    tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _add_over_group(
    first, second, sums_ptr, arrived_ptr, index, place, PROGRAMS: tl.constexpr, SLICE, BLOCK
):
    """Return the sums of two values over all lanes of slice ``index`` that have the same group and
    weight channel, in each of them.

    They are added in the order of the ranks, so that they are the same every time.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(SLICE)
    channel = (place.start + tl.arange(0, BLOCK)) % SLICE
    first = _by_channel(first, place.start, SLICE, BLOCK)
    second = _by_channel(second, place.start, SLICE, BLOCK)
    if PROGRAMS > 1:
        sums = sums_ptr + index.to(tl.int64) * (PROGRAMS * 2 * PADDED)
        own = sums + place.rank * (2 * PADDED) + tl.arange(0, PADDED)
        tl.store(own, first)
        tl.store(own + PADDED, second)
        tl.debug_barrier()
        arrived = arrived_ptr + index.to(tl.int64) * ARRIVED_STRIDE
        tl.atomic_add(arrived, 1, sem="release")
        _wait(arrived, PROGRAMS)
        LINES: tl.constexpr = max(READ_AT_ONCE // (2 * PADDED), 1)
        line = tl.arange(0, LINES)[:, None]
        value = tl.arange(0, 2 * PADDED)[None, :]
        total = tl.zeros((LINES, 2 * PADDED), tl.float32)
        for i in range((PROGRAMS + LINES - 1) // LINES):
            at = i * LINES + line
            # From the second cache: the first may have these lines from before they were written.
            read = tl.load(
                sums + at * (2 * PADDED) + value, at < PROGRAMS, 0.0, cache_modifier=".cg"
            )
            total += read
        total = tl.sum(total, 0)
        first = tl.gather(total, channel, 0)
        second = tl.gather(total, channel + PADDED, 0)
    else:
        first = tl.gather(first, channel, 0)
        second = tl.gather(second, channel, 0)
    return first, second


@triton.jit
def cooperative_forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    arrived_ptr,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EPSILON: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Write y, the aggregation of x with w normalised, and the statistics mean and rstd.

    ACTIVATE: y with the epilogue of ``forward``, and no statistics. Shapes and pointers that the
    option leaves out are as in ``forward``.

    SHAPE is an ``AggregationShape``, CONFIG a ``CooperativeConfig``.
    """
    H: tl.constexpr = SHAPE.h
    W: tl.constexpr = SHAPE.w
    K: tl.constexpr = SHAPE.kernel_size
    CW: tl.constexpr = SHAPE.channels
    TAPS: tl.constexpr = K * K
    C: tl.constexpr = SHAPE.pixel_values
    WC: tl.constexpr = SHAPE.pixel_weights
    ROWS: tl.constexpr = CONFIG.rows
    BLOCK: tl.constexpr = CONFIG.block
    place = _locate_program(PROGRAMS, SHAPE, CONFIG)
    first = place.first
    image, column, group, channel, inside = _locate_lanes(
        place.group, place.start, SHAPE, CONFIG.slice, BLOCK
    )
    near = near_columns(column, inside, SHAPE)
    last = tl.minimum(first + ROWS, H)
    corner = image.to(tl.int64) * (H * W)
    pixel = corner + column
    w = w_ptr + group * (TAPS * CW) + channel
    kept = allocate(ROWS * K * ((K + 1) // 2), BLOCK)
    # Differences from a first value keep the squares small where the mean is large.
    origin = tl.load(w + corner * WC, inside, 0.0).to(tl.float32)
    w += (pixel + first * W) * WC
    loaded = ()
    for row in tl.static_range(ROWS):
        for tap in tl.static_range(TAPS):
            at = w + row * W * WC + tap * CW
            loaded = loaded + (tl.load(at, inside & (first + row < last), 0.0),)
    # Not tl.zeros: what is loaded has the layout that the sums should have.
    total = origin * 0.0
    square = origin * 0.0
    for row in tl.static_range(ROWS):
        weights = loaded[row * TAPS : (row + 1) * TAPS]
        keep_weights(kept, row, weights, BLOCK, K)
        for tap in tl.static_range(TAPS):
            difference = weights[tap].to(tl.float32) - origin
            if H % ROWS != 0:
                difference = tl.where(first + row < last, difference, 0.0)
            total += difference
            square += difference * difference
    x_channel = group * (SHAPE.share * CW) + channel
    values = ()
    if CONFIG.prefetch:
        x = x_ptr + (pixel + (first - K // 2) * W) * C + x_channel
        values = load_values(x, near, first - K // 2, last, SHAPE, CW, SHAPE.share)
    # fmt: off
    total, square = _add_over_group(total, square, sums_ptr, arrived_ptr, place.group, place,
                                    PROGRAMS, CONFIG.slice, BLOCK)
    mean = total / (H * W * TAPS)
    variance = tl.maximum(square / (H * W * TAPS) - mean * mean, 0.0)
    mean += origin
    rstd = 1.0 / tl.sqrt(variance + EPSILON)
    if not ACTIVATE:
        one = inside & (column == 0) & (first == 0)
        statistic = (image.to(tl.int64) * SHAPE.groups + group) * CW + channel
        tl.store(mean_ptr + statistic, mean, one)
        tl.store(rstd_ptr + statistic, rstd, one)
    walk_forward(ForwardPointers(x_ptr, w_ptr, output_scale_ptr, output_shift_ptr, y_ptr),
                 Normalization(mean, rstd, scale_ptr, bias_ptr),
                 Lanes(pixel, column, image, group, channel, None, inside), near, x_channel,
                 Kept(kept, values), first, last, SHAPE, CONFIG, True, True, ACTIVATE)
    # fmt: on


@triton.jit
def cooperative_backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    dw_ptr,
    parameters_ptr,
    sums_ptr,
    arrived_ptr,
    N: tl.constexpr,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write dx, and dw with respect to the weights before their normalisation.

    GROUPS cooperative groups are at work on a slice; each takes every GROUPS-th image. The
    gradients of scale and bias are left as partial sums over each lane's pixels, parameters
    [2, GROUPS, chunks of rows, W, G, K*K, Cw] float32.

    SHAPE is an ``AggregationShape``, CONFIG a ``CooperativeConfig``.
    """
    H: tl.constexpr = SHAPE.h
    W: tl.constexpr = SHAPE.w
    K: tl.constexpr = SHAPE.kernel_size
    CW: tl.constexpr = SHAPE.channels
    TAPS: tl.constexpr = K * K
    WC: tl.constexpr = SHAPE.pixel_weights
    SLICES: tl.constexpr = SHAPE.groups * CW // CONFIG.slice
    ROWS: tl.constexpr = CONFIG.rows
    BLOCK: tl.constexpr = CONFIG.block
    ROW: tl.constexpr = TAPS * BLOCK * 4
    place = _locate_program(PROGRAMS, SHAPE, CONFIG)
    first = place.first
    ahead, column, group, channel, inside = _locate_lanes(
        place.group, place.start, SHAPE, CONFIG.slice, BLOCK
    )
    near = near_columns(column, inside, SHAPE)
    slots = weight_slots(near, inside, SHAPE, True)
    last = tl.minimum(first + ROWS, H)
    w_channel = group * (TAPS * CW) + channel
    # Rows of dw and w, then sums for the gradients of scale and of bias, by tap.
    kept = allocate((ROWS + 2) * TAPS, BLOCK)
    totals = kept + ROWS * ROW
    for tap in tl.static_range(2 * TAPS):
        put(totals + tap * (BLOCK * 4), tl.zeros((BLOCK,), tl.int32))
    for turn in range((N - ahead + GROUPS - 1) // GROUPS):
        image = ahead + turn * GROUPS
        images = tl.zeros((BLOCK,), tl.int32) + image
        pixel = images.to(tl.int64) * (H * W) + column
        # fmt: off
        pointers = Normalization(mean_ptr, rstd_ptr, scale_ptr, bias_ptr)
        statistics = load_statistics(pointers, images, group, channel, inside, SHAPE)
        mean = statistics.mean
        rstd = statistics.rstd
        factors, shifts = normalization_coefficients(statistics, group, channel, near, inside,
                                                     SHAPE, True)
        total, product = walk_backward(
            BackwardPointers(x_ptr, w_ptr, dy_ptr, dx_ptr),
            WeightNormalization(mean, factors, shifts),
            Lanes(pixel, column, images, group, channel, None, inside), near,
            group * (SHAPE.share * CW) + channel, slots, None, kept, first, last, SHAPE, CONFIG,
            True, True)
        total, product = _add_over_group(total, product, sums_ptr, arrived_ptr,
                                         place.group + turn * (GROUPS * SLICES), place, PROGRAMS,
                                         CONFIG.slice, BLOCK)
        # fmt: on
        constant = total / (H * W * TAPS)
        slope = product * rstd * rstd / (H * W * TAPS)
        scale_gradients = ()
        bias_gradients = ()
        for _ in tl.static_range(TAPS):
            # Not tl.zeros: what is loaded has the layout that the sums should have.
            scale_gradients = scale_gradients + (mean * 0.0,)
            bias_gradients = bias_gradients + (mean * 0.0,)
        dw = dw_ptr + (pixel + first * W) * WC + w_channel
        for row in range(ROWS):
            own = inside & (first + row < last)
            added_scale = ()
            added_bias = ()
            for tap in tl.static_range(TAPS):
                # fmt: off
                gradient, weight = unpack(get(kept + row * ROW + tap * (BLOCK * 4)),
                                          w_ptr.dtype.element_ty)
                # fmt: on
                difference = weight - mean
                if H % ROWS != 0:
                    gradient = tl.where(own, gradient, 0.0)
                    difference = tl.where(own, difference, 0.0)
                added_scale = added_scale + (scale_gradients[tap] + gradient * difference,)
                added_bias = added_bias + (bias_gradients[tap] + gradient,)
                raw = gradient * factors[tap] - constant - slope * difference
                at = dw + slots.offsets[tap % K] + (tap // K * K) * CW
                tl.store(at, raw.to(dw_ptr.dtype.element_ty), own)
            scale_gradients = added_scale
            bias_gradients = added_bias
            dw += W * WC
        for tap in tl.static_range(TAPS):
            _add_kept(totals + tap * (BLOCK * 4), scale_gradients[tap] * rstd)
            _add_kept(totals + ROW + tap * (BLOCK * 4), bias_gradients[tap])
    CHUNKS: tl.constexpr = (H + ROWS - 1) // ROWS
    line = (ahead * CHUNKS + first // ROWS) * W + column
    parameters = parameters_ptr + line * WC + w_channel
    for tap in tl.static_range(TAPS):
        at = parameters + tap * CW
        tl.store(at, _kept_of_tap(totals, tap, near, K, BLOCK), inside)
        bias_gradient = _kept_of_tap(totals + ROW, tap, near, K, BLOCK)
        tl.store(at + GROUPS * CHUNKS * W * WC, bias_gradient, inside)


@triton.jit
def _add_kept(address, value):
    """Add to a float32 word that the lanes keep."""
    total = get(address).to(tl.float32, bitcast=True) + value
    put(address, total.to(tl.int32, bitcast=True))


@triton.jit
def _kept_of_tap(address, tap: tl.constexpr, near, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of the float32 words kept for those of a lane's slots that are of a tap."""
    j: tl.constexpr = tap % K
    kept = get(address + tap * (BLOCK * 4)).to(tl.float32, bitcast=True)
    if j != K // 2:
        mirrored: tl.constexpr = tap - j + K - 1 - j
        other = get(address + mirrored * (BLOCK * 4)).to(tl.float32, bitcast=True)
        kept = tl.where(near[K - 1 - j], kept, 0.0) + tl.where(near[j], 0.0, other)
    return kept
