"""Triton kernels of the weights' group normalisation; importable only where triton is.

Weights w and their gradients are [N, H, W, G, TAPS, CW], statistics [N, G, CW] float32. Memory is
read in the order in which it lies, in as wide pieces as its alignment allows.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(
    w_ptr,
    mean_ptr,
    factor_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    CW: tl.constexpr,
    TAPS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Mean of w over pixels and taps, and 1 / sqrt(variance + EPSILON).

    One program has one picture and group. It reads runs of RUN values without a gap, padded to a
    power of two: CW where the next run follows at once, the pixel's TAPS * CW otherwise. BLOCK
    values are read at a time, AHEAD times before the first is used.
    """
    LANES: tl.constexpr = triton.next_power_of_2(RUN)
    CHANNELS: tl.constexpr = triton.next_power_of_2(CW)
    ROWS: tl.constexpr = H * W * TAPS * CW // RUN
    STRIDE: tl.constexpr = G * RUN
    STEP: tl.constexpr = BLOCK // LANES
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    exists = lane < RUN
    start = (program // G) * (H * W * G * TAPS * CW) + (program % G) * (TAPS * CW)
    # Differences from a first value keep the squares small where the mean is large.
    origin = tl.load(w_ptr + start + lane % CW).to(tl.float32)[None, :]
    row = tl.arange(0, STEP)[:, None]
    w = w_ptr + start + row * STRIDE + lane[None, :]
    total = tl.zeros((STEP, LANES), tl.float32)
    square = tl.zeros((STEP, LANES), tl.float32)
    for step in range((ROWS + STEP * AHEAD - 1) // (STEP * AHEAD)):
        loaded = ()
        for i in tl.static_range(AHEAD):
            mask = (row + (step * AHEAD + i) * STEP < ROWS) & exists[None, :]
            loaded = loaded + (tl.load(w + i * STEP * STRIDE, mask, 0.0),)
        for i in tl.static_range(AHEAD):
            mask = (row + (step * AHEAD + i) * STEP < ROWS) & exists[None, :]
            difference = tl.where(mask, loaded[i].to(tl.float32) - origin, 0.0)
            total += difference
            square += difference * difference
        w += AHEAD * STEP * STRIDE
    channel = tl.arange(0, CHANNELS)
    total = _fold(tl.sum(total, 0), channel, CW, RUN)
    square = _fold(tl.sum(square, 0), channel, CW, RUN)
    mean = total / (H * W * TAPS)
    variance = tl.maximum(square / (H * W * TAPS) - mean * mean, 0.0)
    origin = tl.load(w_ptr + start + channel, channel < CW, 0.0).to(tl.float32)
    tl.store(mean_ptr + program * CW + channel, origin + mean, channel < CW)
    factor = 1.0 / tl.sqrt(variance + EPSILON)
    tl.store(factor_ptr + program * CW + channel, factor, channel < CW)


@triton.jit
def _fold(values, index, PERIOD: tl.constexpr, LENGTH: tl.constexpr):
    """Sums of every PERIOD-th of LENGTH values, from each index on."""
    if PERIOD == LENGTH and values.shape == index.shape:
        return values
    index = tl.minimum(index, PERIOD - 1)
    total = tl.gather(values, index, 0)
    for i in tl.static_range(1, LENGTH // PERIOD):
        total += tl.gather(values, index + i * PERIOD, 0)
    return total


@triton.jit
def group_norm_backward(
    w_ptr,
    dw_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    sums_ptr,
    raw_dw_ptr,
    parameters_ptr,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    CW: tl.constexpr,
    TAPS: tl.constexpr,
    PICTURES: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """raw_dw, the gradient of the weights, from dw, that of the normalised ones.

    sums [2, N, G, CW] are, over a group, those of dw * scale * factor and of that times w - mean.
    The gradients of scale and bias are left in parameters as sums over a program's pixels,
    [2, programs, G, TAPS, CW] float32. A program has PICTURES pictures, or one of PIECES of a
    picture. A lane keeps its tap and channel.
    """
    WC: tl.constexpr = G * TAPS * CW
    COUNT: tl.constexpr = H * W * TAPS
    LENGTH: tl.constexpr = H * W * WC
    STEP: tl.constexpr = BLOCK // WC * WC
    STEPS: tl.constexpr = ((LENGTH + STEP - 1) // STEP + PIECES - 1) // PIECES
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    exists = lane < STEP
    parameter = lane % WC
    statistic = parameter // (TAPS * CW) * CW + parameter % CW
    scale_gradient = tl.zeros((BLOCK,), tl.float32)
    bias_gradient = tl.zeros((BLOCK,), tl.float32)
    for i in range(PICTURES):
        # Last pictures first: the kernel before has left them in the cache.
        picture = N - 1 - (program // PIECES * PICTURES + i)
        there = exists & (picture >= 0)
        index = picture * (G * CW) + statistic
        mean = tl.load(mean_ptr + index, there, 0.0)
        factor = tl.load(factor_ptr + index, there, 0.0)
        constant = tl.load(sums_ptr + index, there, 0.0) / COUNT
        slope = tl.load(sums_ptr + N * G * CW + index, there, 0.0) * factor * factor / COUNT
        multiplier = tl.load(scale_ptr + parameter) * factor
        product = tl.zeros((BLOCK,), tl.float32)
        first = (program % PIECES) * STEPS
        start = picture.to(tl.int64) * LENGTH
        for step in range((STEPS + AHEAD - 1) // AHEAD):
            weights = ()
            gradients = ()
            for j in tl.static_range(AHEAD):
                offset = (first + step * AHEAD + j) * STEP + lane
                mask = there & (offset < LENGTH) & (step * AHEAD + j < STEPS)
                weights = weights + (tl.load(w_ptr + start + offset, mask, 0.0),)
                gradients = gradients + (tl.load(dw_ptr + start + offset, mask, 0.0),)
            for j in tl.static_range(AHEAD):
                offset = (first + step * AHEAD + j) * STEP + lane
                mask = there & (offset < LENGTH) & (step * AHEAD + j < STEPS)
                difference = weights[j].to(tl.float32) - mean
                gradient = gradients[j].to(tl.float32)
                bias_gradient += gradient
                product += gradient * difference
                raw = gradient * multiplier - constant - slope * difference
                tl.store(raw_dw_ptr + start + offset, raw.to(raw_dw_ptr.dtype.element_ty), mask)
        scale_gradient += product * factor
    parameter = tl.arange(0, triton.next_power_of_2(WC))
    parameters = parameters_ptr + program * WC + parameter
    scale_gradient = _fold(scale_gradient, parameter, WC, STEP)
    bias_gradient = _fold(bias_gradient, parameter, WC, STEP)
    tl.store(parameters, scale_gradient, parameter < WC)
    tl.store(parameters + tl.num_programs(0) * WC, bias_gradient, parameter < WC)
