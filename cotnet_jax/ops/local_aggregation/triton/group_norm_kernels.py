"""Triton kernels of the weights' group normalisation; importable only where triton is.

Weights w and their gradients are [N, H, W, G, TAPS, Cw], statistics [N, G, Cw] float32. Memory is
read in the order in which it lies, in as wide pieces as its alignment allows.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(
    w_ptr,
    mean_ptr,
    rstd_ptr,
    PIXELS: tl.constexpr,
    G: tl.constexpr,
    CW: tl.constexpr,
    TAPS: tl.constexpr,
    CONFIG: tl.constexpr,
    EPSILON: tl.constexpr,
    RUN: tl.constexpr,
):
    """Write the mean of w over pixels and taps, and rstd, 1 / sqrt(variance + EPSILON).

    One program has one image and group. It reads runs of RUN values without a gap, padded to a
    power of two: Cw where the next run follows at once, the pixel's TAPS * Cw otherwise. A block is
    read at a time, the stages less one times before the first is used.
    """
    LANES: tl.constexpr = triton.next_power_of_2(RUN)
    CHANNELS: tl.constexpr = triton.next_power_of_2(CW)
    ROWS: tl.constexpr = PIXELS * TAPS * CW // RUN
    STRIDE: tl.constexpr = G * RUN
    STEP: tl.constexpr = CONFIG.block // LANES
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    exists = lane < RUN
    start = (program // G) * (PIXELS * G * TAPS * CW) + (program % G) * (TAPS * CW)
    # Differences from the first pixel's mean keep the squares small where the mean is large.
    origin = _first_mean(w_ptr + start + lane % CW, CW, TAPS)
    row = tl.arange(0, STEP)[:, None]
    w = w_ptr + start + row * STRIDE + lane[None, :]
    total = tl.zeros((STEP, LANES), tl.float32)
    square = tl.zeros((STEP, LANES), tl.float32)
    for step in tl.range(0, (ROWS + STEP - 1) // STEP, num_stages=CONFIG.num_stages):
        mask = (row + step * STEP < ROWS) & exists[None, :]
        difference = tl.load(w, mask, 0.0).to(tl.float32) - origin[None, :]
        difference = tl.where(mask, difference, 0.0)
        total += difference
        square += difference * difference
        w += STEP * STRIDE
    channel = tl.arange(0, CHANNELS)
    total = _fold(tl.sum(total, 0), channel, CW, RUN)
    square = _fold(tl.sum(square, 0), channel, CW, RUN)
    mean = total / (PIXELS * TAPS)
    variance = tl.maximum(square / (PIXELS * TAPS) - mean * mean, 0.0)
    origin = _fold(origin, channel, CW, CW)
    tl.store(mean_ptr + program * CW + channel, origin + mean, channel < CW)
    # Not approximated: an error here is one of all of an image's weights.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + EPSILON))
    tl.store(rstd_ptr + program * CW + channel, rstd, channel < CW)


@triton.jit
def _first_mean(w, CW: tl.constexpr, TAPS: tl.constexpr):
    """Return the mean over the taps of the pixel at ``w``."""
    total = tl.load(w).to(tl.float32)
    for tap in tl.static_range(1, TAPS):
        total += tl.load(w + tap * CW).to(tl.float32)
    return total / TAPS


@triton.jit
def _fold(values, index, PERIOD: tl.constexpr, LENGTH: tl.constexpr):
    """Return the sums of every PERIOD-th of LENGTH values, from each index on."""
    if PERIOD == LENGTH and values.shape == index.shape:
        return values
    index = tl.minimum(index, PERIOD - 1)
    total = tl.gather(values, index, 0)
    for i in tl.static_range(1, LENGTH // PERIOD):
        total += tl.gather(values, index + i * PERIOD, 0)
    return total


@triton.jit
def _add_lines(sums, there, LINES, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the column sums of [LINES, WIDTH] float32, padded to a power of two."""
    LANES: tl.constexpr = triton.next_power_of_2(WIDTH)
    STEP: tl.constexpr = BLOCK // LANES
    line = tl.arange(0, STEP)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    total = tl.zeros((STEP, LANES), tl.float32)
    for step in range((LINES + STEP - 1) // STEP):
        mask = there & (step * STEP + line < LINES) & (lane < WIDTH)
        total += tl.load(sums + (step * STEP + line) * WIDTH + lane, mask, 0.0)
    return tl.sum(total, 0)


@triton.jit
def group_norm_backward(
    w_ptr,
    dw_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    sums_ptr,
    raw_dw_ptr,
    parameters_ptr,
    N: tl.constexpr,
    PIXELS: tl.constexpr,
    G: tl.constexpr,
    CW: tl.constexpr,
    TAPS: tl.constexpr,
    CONFIG: tl.constexpr,
    IMAGES: tl.constexpr,
    PIECES: tl.constexpr,
    LINES: tl.constexpr,
):
    """Write raw_dw, the gradient of the weights, from dw, that of the normalised ones.

    The partial sums of ``backward``, here sums [2, N, LINES, G, Cw], are added up over the lines.
    The gradients of scale and bias are left in parameters as partial sums over a program's pixels,
    [2, programs, G, TAPS, Cw] float32. A program has IMAGES images, or one of PIECES of an image. A
    lane, one element of the block, keeps its tap and channel. A block is read at a time, the stages
    less one times before the first is used.
    """
    BLOCK: tl.constexpr = CONFIG.block
    WC: tl.constexpr = G * TAPS * CW
    COUNT: tl.constexpr = PIXELS * TAPS
    LENGTH: tl.constexpr = PIXELS * WC
    STEP: tl.constexpr = BLOCK // WC * WC
    STEPS: tl.constexpr = ((LENGTH + STEP - 1) // STEP + PIECES - 1) // PIECES
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    exists = lane < STEP
    parameter = lane % WC
    statistic = parameter // (TAPS * CW) * CW + parameter % CW
    scale_gradient = tl.zeros((BLOCK,), tl.float32)
    bias_gradient = tl.zeros((BLOCK,), tl.float32)
    for i in range(IMAGES):
        # Last images first: the kernel before has left them in the cache.
        image = N - 1 - (program // PIECES * IMAGES + i)
        there = exists & (image >= 0)
        index = image * (G * CW) + statistic
        mean = tl.load(mean_ptr + index, there, 0.0)
        rstd = tl.load(rstd_ptr + index, there, 0.0)
        sums = sums_ptr + image.to(tl.int64) * (LINES * G * CW)
        constant = _add_lines(sums, image >= 0, LINES, G * CW, BLOCK)
        constant = tl.gather(constant, statistic, 0) / COUNT
        sums += N * LINES * G * CW
        slope = _add_lines(sums, image >= 0, LINES, G * CW, BLOCK)
        slope = tl.gather(slope, statistic, 0) * rstd * rstd / COUNT
        multiplier = tl.load(scale_ptr + parameter) * rstd
        product = tl.zeros((BLOCK,), tl.float32)
        first = (program % PIECES) * STEPS
        start = image.to(tl.int64) * LENGTH
        for step in tl.range(0, STEPS, num_stages=CONFIG.num_stages):
            offset = (first + step) * STEP + lane
            mask = there & (offset < LENGTH)
            weight = tl.load(w_ptr + start + offset, mask, 0.0).to(tl.float32)
            gradient = tl.load(dw_ptr + start + offset, mask, 0.0).to(tl.float32)
            difference = weight - mean
            bias_gradient += gradient
            product += gradient * difference
            raw = gradient * multiplier - constant - slope * difference
            tl.store(raw_dw_ptr + start + offset, raw.to(raw_dw_ptr.dtype.element_ty), mask)
        scale_gradient += product * rstd
    parameter = tl.arange(0, triton.next_power_of_2(WC))
    parameters = parameters_ptr + program * WC + parameter
    scale_gradient = _fold(scale_gradient, parameter, WC, STEP)
    bias_gradient = _fold(bias_gradient, parameter, WC, STEP)
    tl.store(parameters, scale_gradient, parameter < WC)
    tl.store(parameters + tl.num_programs(0) * WC, bias_gradient, parameter < WC)
