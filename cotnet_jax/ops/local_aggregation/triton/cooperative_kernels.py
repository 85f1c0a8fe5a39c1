"""Triton kernels that normalise the weights of a picture and aggregate with them at once;
importable only where triton is.

Normalisation needs sums over a whole picture before the first weight, or its gradient, can be
normalised. Here a team of MEMBERS programs has SLICE of a picture's weight channels, each member
BLOCK lanes of its columns and a chunk of ROWS rows. A program reads its weights, or computes their
gradients, once, and keeps them in shared memory; it gives its sums to the team, waits for those of
the others, and goes on with what it kept. So every array is read or written once.

All programs of a team must run at the same time. GPUs start programs in the order of their numbers
(NVIDIA's own scans rely on it), and the numbers of a team are consecutive, so that this holds if a
team has no more programs than fit on the GPU together: the caller sees to it.

Lanes are as in ``aggregation_kernels``, but of one slice, and have all shares of a weight. Shapes
as there; values and weights have 16 bits. A slice has all G * CW weight channels, or a divisor of
CW of them; there are N * SLICES. ``sums`` are [N * SLICES, MEMBERS, 2, SLICE] float32, SLICE padded
to a power of two, and the first of each slice's ``arrived`` [N * SLICES, 32] int32 counts the
members that have written theirs. It is zero at the start. (A cache line each: many programs wait
for different slices.) A team of one needs neither.
"""

import triton
import triton.language as tl

from cotnet_jax.ops.local_aggregation.triton.aggregation_kernels import (
    affine,
    keep_weights,
    load_statistics,
    load_values,
    near_columns,
    walk_backward,
    walk_forward,
    weight_slots,
)
from cotnet_jax.ops.local_aggregation.triton.shared_memory import allocate, get, put, unpack

# Sums that a program reads at a time.
READ_AT_ONCE = tl.constexpr(512)
# Counters of arrivals for a slice, of which the first is used.
ARRIVED_STRIDE = tl.constexpr(32)


@triton.jit
def _place(MEMBERS, H, ROWS, BLOCK):
    """The program's team, its number in it, and the first of its rows and of its lanes."""
    CHUNKS: tl.constexpr = (H + ROWS - 1) // ROWS
    member = tl.program_id(0) % MEMBERS
    team = tl.program_id(0) // MEMBERS
    return team, member, (member % CHUNKS) * ROWS, member // CHUNKS * BLOCK


@triton.jit
def _lanes(index, start, W, G, CW, SLICE, BLOCK: tl.constexpr):
    """Picture of slice ``index``, and column, group and weight channel of each lane, and whether
    it exists."""
    lane = start + tl.arange(0, BLOCK)
    column = lane // SLICE
    if SLICE == G * CW:
        picture = index
        group = lane // CW % G
        channel = lane % CW
    else:
        EACH: tl.constexpr = CW // SLICE
        picture = index // (G * EACH)
        group = index // EACH % G
        # So written the compiler knows that it starts at a multiple, and reads several at once.
        channel = index % EACH * SLICE + lane % SLICE
    return picture, column, group, channel, column < W


@triton.jit
def _by_channel(values, start, SLICE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the lanes that have the same group and weight channel, [SLICE padded]."""
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
def _wait(arrived, MEMBERS):
    """Returns when all members have arrived, and what they wrote before can be read."""
    while tl.load(arrived, volatile=True) < MEMBERS:
        pass
    tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _add_over_team(
    first,
    second,
    sums_ptr,
    arrived_ptr,
    index,
    member,
    MEMBERS: tl.constexpr,
    start,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of two values over all lanes of slice ``index`` that have the same group and weight
    channel, in each of them. In the order of the members, so that they are the same every time."""
    PADDED: tl.constexpr = triton.next_power_of_2(SLICE)
    channel = (start + tl.arange(0, BLOCK)) % SLICE
    first = _by_channel(first, start, SLICE, BLOCK)
    second = _by_channel(second, start, SLICE, BLOCK)
    if MEMBERS > 1:
        sums = sums_ptr + index.to(tl.int64) * (MEMBERS * 2 * PADDED)
        own = sums + member * (2 * PADDED) + tl.arange(0, PADDED)
        tl.store(own, first)
        tl.store(own + PADDED, second)
        tl.debug_barrier()
        arrived = arrived_ptr + index.to(tl.int64) * ARRIVED_STRIDE
        tl.atomic_add(arrived, 1, sem="release")
        _wait(arrived, MEMBERS)
        LINES: tl.constexpr = max(READ_AT_ONCE // (2 * PADDED), 1)
        line = tl.arange(0, LINES)[:, None]
        value = tl.arange(0, 2 * PADDED)[None, :]
        total = tl.zeros((LINES, 2 * PADDED), tl.float32)
        for i in range((MEMBERS + LINES - 1) // LINES):
            at = i * LINES + line
            # From the second cache: the first may have these lines from before they were written.
            read = tl.load(
                sums + at * (2 * PADDED) + value, at < MEMBERS, 0.0, cache_modifier=".cg"
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
def _forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    mean_ptr,
    factor_ptr,
    sums_ptr,
    arrived_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    C: tl.constexpr = G * CW * SHARE
    TAPS: tl.constexpr = K * K
    WC: tl.constexpr = G * CW * TAPS
    index, member, first, start = _place(MEMBERS, H, ROWS, BLOCK)
    picture, column, group, channel, inside = _lanes(index, start, W, G, CW, SLICE, BLOCK)
    near = near_columns(column, inside, W, K)
    last = tl.minimum(first + ROWS, H)
    corner = picture.to(tl.int64) * (H * W)
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
    x_channel = group * (SHARE * CW) + channel
    values = ()
    if PREFETCH:
        x = x_ptr + (pixel + (first - K // 2) * W) * C + x_channel
        values = load_values(x, near, first - K // 2, last, H, C, CW, SHARE, K)
    # fmt: off
    total, square = _add_over_team(total, square, sums_ptr, arrived_ptr, index, member, MEMBERS,
                                   start, SLICE, BLOCK)
    mean = total / (H * W * TAPS)
    variance = tl.maximum(square / (H * W * TAPS) - mean * mean, 0.0)
    mean += origin
    factor = 1.0 / tl.sqrt(variance + EPSILON)
    if not ACTIVATE:
        one = inside & (column == 0) & (first == 0)
        statistic = (picture.to(tl.int64) * G + group) * CW + channel
        tl.store(mean_ptr + statistic, mean, one)
        tl.store(factor_ptr + statistic, factor, one)
    walk_forward(x_ptr, w_ptr, scale_ptr, bias_ptr, output_scale_ptr, output_shift_ptr, y_ptr,
                 pixel, near, inside, x_channel, group, channel, mean, factor, kept, values, first,
                 last, H, W, C, WC, CW, K, CW, SHARE, ROWS, BLOCK, PREFETCH, False, True, True,
                 ACTIVATE)
    # fmt: on


@triton.jit
def team_forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    factor_ptr,
    sums_ptr,
    arrived_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """y from x and normalised weights, and the statistics mean and factor [N, G, CW] float32."""
    # fmt: off
    _forward(x_ptr, w_ptr, scale_ptr, bias_ptr, None, None, y_ptr, mean_ptr, factor_ptr, sums_ptr,
             arrived_ptr, H, W, G, SHARE, CW, K, MEMBERS, SLICE, ROWS, BLOCK, PREFETCH, EPSILON,
             False)
    # fmt: on


@triton.jit
def team_activated_forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    sums_ptr,
    arrived_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """SiLU(output_scale * y + output_shift) of ``team_forward``'s y; both [C] float32."""
    # fmt: off
    _forward(x_ptr, w_ptr, scale_ptr, bias_ptr, output_scale_ptr, output_shift_ptr, y_ptr, None,
             None, sums_ptr, arrived_ptr, H, W, G, SHARE, CW, K, MEMBERS, SLICE, ROWS, BLOCK,
             PREFETCH, EPSILON, True)
    # fmt: on


@triton.jit
def team_backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    dw_ptr,
    parameters_ptr,
    sums_ptr,
    arrived_ptr,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    TEAMS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """dx, and dw in respect of the weights before their normalisation.

    A team takes its slice of every TEAMS-th picture. The gradients of scale and bias are left as
    sums over each lane's pixels, parameters [2, TEAMS, chunks of rows, W, G, K*K, CW] float32.
    """
    C: tl.constexpr = G * CW * SHARE
    TAPS: tl.constexpr = K * K
    WC: tl.constexpr = G * CW * TAPS
    ROW: tl.constexpr = TAPS * BLOCK * 4
    index, member, first, start = _place(MEMBERS, H, ROWS, BLOCK)
    team, column, group, channel, inside = _lanes(index, start, W, G, CW, SLICE, BLOCK)
    near = near_columns(column, inside, W, K)
    offsets, exist = weight_slots(near, inside, WC, CW, K, True)
    last = tl.minimum(first + ROWS, H)
    w_channel = group * (TAPS * CW) + channel
    # Rows of dw and w, then sums for the gradients of scale and of bias, by tap.
    kept = allocate((ROWS + 2) * TAPS, BLOCK)
    totals = kept + ROWS * ROW
    for tap in tl.static_range(2 * TAPS):
        put(totals + tap * (BLOCK * 4), tl.zeros((BLOCK,), tl.int32))
    for turn in range((N - team + TEAMS - 1) // TEAMS):
        picture = team + turn * TEAMS
        pictures = tl.zeros((BLOCK,), tl.int32) + picture
        pixel = pictures.to(tl.int64) * (H * W) + column
        # fmt: off
        mean, factor = load_statistics(mean_ptr, factor_ptr, pictures, group, channel, inside, G,
                                       CW)
        factors, summands = affine(mean, factor, scale_ptr, bias_ptr, group, channel, near, inside,
                                   CW, K, True)
        total, product = walk_backward(
            x_ptr, w_ptr, dy_ptr, dx_ptr, None, pixel, near, inside,
            group * (SHARE * CW) + channel, w_channel, offsets, exist, None, None, None, mean,
            factors, summands, kept, first, last, H, W, C, WC, CW, K, CW, SHARE, 1, CW, ROWS, BLOCK,
            PREFETCH, True, True)
        total, product = _add_over_team(total, product, sums_ptr, arrived_ptr,
                                        index + turn * (TEAMS * (G * CW // SLICE)), member, MEMBERS,
                                        start, SLICE, BLOCK)
        # fmt: on
        constant = total / (H * W * TAPS)
        slope = product * factor * factor / (H * W * TAPS)
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
                at = dw + offsets[tap % K] + (tap // K * K) * CW
                tl.store(at, raw.to(dw_ptr.dtype.element_ty), own)
            scale_gradients = added_scale
            bias_gradients = added_bias
            dw += W * WC
        for tap in tl.static_range(TAPS):
            _add_kept(totals + tap * (BLOCK * 4), scale_gradients[tap] * factor)
            _add_kept(totals + ROW + tap * (BLOCK * 4), bias_gradients[tap])
    CHUNKS: tl.constexpr = (H + ROWS - 1) // ROWS
    line = (team * CHUNKS + first // ROWS) * W + column
    parameters = parameters_ptr + line * WC + w_channel
    for tap in tl.static_range(TAPS):
        at = parameters + tap * CW
        tl.store(at, _kept_of_tap(totals, tap, near, K, BLOCK), inside)
        bias_gradient = _kept_of_tap(totals + ROW, tap, near, K, BLOCK)
        tl.store(at + TEAMS * CHUNKS * W * WC, bias_gradient, inside)


@triton.jit
def _add_kept(address, value):
    """Adds to a float32 word that the lanes keep."""
    total = get(address).to(tl.float32, bitcast=True) + value
    put(address, total.to(tl.int32, bitcast=True))


@triton.jit
def _kept_of_tap(address, tap: tl.constexpr, near, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the float32 words kept for those of a lane's slots that are of a tap."""
    j: tl.constexpr = tap % K
    kept = get(address + tap * (BLOCK * 4)).to(tl.float32, bitcast=True)
    if j != K // 2:
        mirrored: tl.constexpr = tap - j + K - 1 - j
        other = get(address + mirrored * (BLOCK * 4)).to(tl.float32, bitcast=True)
        kept = tl.where(near[K - 1 - j], kept, 0.0) + tl.where(near[j], 0.0, other)
    return kept
