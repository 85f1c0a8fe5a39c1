"""Triton kernels that normalise the weights of a picture and aggregate with them at once;
importable only where triton is.

Normalisation needs sums over a whole picture before the first weight, or its gradient, can be
normalised. A program here has all pixels of a picture, and a slice of the weight channels of one
group. It reads its weights for the sums, or writes their gradients, and comes back to them while
they are still in the cache. That is faster where a picture is small.

Lanes are columns, as in ``aggregation_kernels``, with PADDED weight channels each, a power of two
of which the first SLICE exist. Shapes as there.
"""

import triton
import triton.language as tl

from cotnet_jax.layers.aggregation_kernels import (
    affine,
    load_statistics,
    near_columns,
    walk_backward,
    walk_forward,
)


@triton.jit
def _place(G, CW, SLICE: tl.constexpr):
    """The program's picture and group, and the first weight channel of its slice."""
    SLICES: tl.constexpr = (CW + SLICE - 1) // SLICE
    program = tl.program_id(0)
    picture = (program // (SLICES * G)).to(tl.int64)
    return picture, (program // SLICES) % G, (program % SLICES) * SLICE


@triton.jit
def _columns(first_channel, W, PARTS, CW, SLICE, PADDED, BLOCK: tl.constexpr):
    """Column, part and weight channel of each lane, and whether it exists."""
    lane = tl.arange(0, BLOCK)
    offset = lane % PADDED
    column = lane // (PADDED * PARTS)
    channel = first_channel + offset
    inside = (column < W) & (offset < SLICE) & (channel < CW)
    return column, (lane // PADDED) % PARTS, channel, inside


@triton.jit
def _sum(values, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over a weight channel's lanes, in each of them."""
    by_channel = tl.reshape(values, (BLOCK // PADDED, PADDED))
    total = tl.broadcast_to(tl.sum(by_channel, 0)[None, :], (BLOCK // PADDED, PADDED))
    return tl.reshape(total, (BLOCK,))


@triton.jit
def _statistics(
    w,
    part,
    inside,
    origin,
    H: tl.constexpr,
    W: tl.constexpr,
    WC: tl.constexpr,
    CW: tl.constexpr,
    TAPS: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Mean over pixels and taps, and 1 / sqrt(variance + EPSILON), of each lane's channel.

    ``w`` points to the lanes' pixels in row 0; the parts of a column share its rows. Differences
    from ``origin``, a first value, keep the squares small where the mean is large.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    w += part * (W * WC)
    for step in range((H + PARTS * AHEAD - 1) // (PARTS * AHEAD)):
        loaded = ()
        for i in tl.static_range(AHEAD):
            mask = inside & ((step * AHEAD + i) * PARTS + part < H)
            for tap in tl.static_range(TAPS):
                loaded = loaded + (tl.load(w + i * PARTS * W * WC + tap * CW, mask, 0.0),)
        for i in tl.static_range(AHEAD):
            mask = inside & ((step * AHEAD + i) * PARTS + part < H)
            for tap in tl.static_range(TAPS):
                difference = loaded[i * TAPS + tap].to(tl.float32) - origin
                difference = tl.where(mask, difference, 0.0)
                total += difference
                square += difference * difference
        w += AHEAD * PARTS * W * WC
    mean = _sum(total, PADDED, BLOCK) / (H * W * TAPS)
    variance = _sum(square, PADDED, BLOCK) / (H * W * TAPS) - mean * mean
    return origin + mean, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + EPSILON)


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
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    C: tl.constexpr = G * SHARE * CW
    WC: tl.constexpr = G * K * K * CW
    picture, group, first_channel = _place(G, CW, SLICE)
    column, part, channel, inside = _columns(first_channel, W, PARTS, CW, SLICE, PADDED, BLOCK)
    start = picture * (H * W)
    pixel = start + column
    w_channel = group * (K * K * CW) + channel
    origin = tl.load(w_ptr + start * WC + w_channel, inside, 0.0).to(tl.float32)
    # fmt: off
    mean, factor = _statistics(w_ptr + pixel * WC + w_channel, part, inside, origin, H, W, WC, CW,
                               K * K, PARTS, PADDED, BLOCK, AHEAD, EPSILON)
    if not ACTIVATE:
        statistic = (picture * G + group) * CW + channel
        one = inside & (column == 0) & (part == 0)
        tl.store(mean_ptr + statistic, mean, one)
        tl.store(factor_ptr + statistic, factor, one)
    walk_forward(x_ptr, w_ptr, scale_ptr, bias_ptr, output_scale_ptr, output_shift_ptr, y_ptr,
                 pixel, near_columns(column, inside, W, K), inside,
                 group * (SHARE * CW) + part * CW + channel, group, channel, mean, factor, 0, H, H,
                 W, C, WC, CW, K, PARTS * CW, SHARE // PARTS, H, BLOCK, PREFETCH, False, True,
                 ACTIVATE)
    # fmt: on


@triton.jit
def picture_forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    factor_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """y from x and normalised weights, and the statistics mean and factor [N, G, CW] float32."""
    # fmt: off
    _forward(x_ptr, w_ptr, scale_ptr, bias_ptr, None, None, y_ptr, mean_ptr, factor_ptr, H, W, G,
             SHARE, CW, K, PARTS, SLICE, PADDED, BLOCK, AHEAD, PREFETCH, EPSILON, False)
    # fmt: on


@triton.jit
def picture_activated_forward(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """SiLU(output_scale * y + output_shift) of ``picture_forward``'s y; both [C] float32."""
    # fmt: off
    _forward(x_ptr, w_ptr, scale_ptr, bias_ptr, output_scale_ptr, output_shift_ptr, y_ptr, None,
             None, H, W, G, SHARE, CW, K, PARTS, SLICE, PADDED, BLOCK, AHEAD, PREFETCH, EPSILON,
             True)
    # fmt: on


@triton.jit
def picture_backward(
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
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """dx, and dw in respect of the weights before their normalisation.

    The gradients of scale and bias are left as sums over each picture, parameters
    [2, N, G, K*K, CW] float32.
    """
    C: tl.constexpr = G * SHARE * CW
    WC: tl.constexpr = G * K * K * CW
    TAPS: tl.constexpr = K * K
    picture, group, first_channel = _place(G, CW, SLICE)
    column, part, channel, inside = _columns(first_channel, W, PARTS, CW, SLICE, PADDED, BLOCK)
    near = near_columns(column, inside, W, K)
    pixel = picture * (H * W) + column
    w_channel = group * (TAPS * CW) + channel
    above = K // 2 * W
    if PARTS == 1:
        dw = dw_ptr + (pixel - above) * WC + w_channel
        dw_column = column
        dw_inside = inside
        dw_near = near
    else:
        # One lane in PARTS stores the sum over the parts.
        dw_column, _, dw_channel, dw_inside = _columns(
            first_channel, W, 1, CW, SLICE, PADDED, BLOCK // PARTS
        )
        dw = picture * (H * W) + dw_column - above
        dw = dw_ptr + dw * WC + group * (TAPS * CW) + dw_channel
        dw_near = near_columns(dw_column, dw_inside, W, K)
    mean, factor = load_statistics(mean_ptr, factor_ptr, picture, group, channel, inside, G, CW)
    factors, summands = affine(mean, factor, scale_ptr, bias_ptr, group, channel, inside, CW, TAPS)
    # fmt: off
    total, product = walk_backward(
        x_ptr, w_ptr, dy_ptr, dx_ptr, dw, pixel, near, inside,
        group * (SHARE * CW) + part * CW + channel, w_channel, dw_column, dw_near, dw_inside, mean,
        factors, summands, 0, H, H, W, C, WC, CW, K, PARTS * CW, SHARE // PARTS, PARTS, PADDED, H,
        BLOCK, PREFETCH, True)
    # fmt: on
    constant = _sum(total, PADDED, BLOCK) / (H * W * TAPS)
    slope = _sum(product, PADDED, BLOCK) * factor * factor / (H * W * TAPS)

    # Till here dw is that of the normalised weights, written by other threads of this program.
    tl.debug_barrier()
    scale_gradients = ()
    bias_gradients = ()
    for _ in tl.static_range(TAPS):
        scale_gradients = scale_gradients + (tl.zeros((BLOCK,), tl.float32),)
        bias_gradients = bias_gradients + (tl.zeros((BLOCK,), tl.float32),)
    # Last rows first: they are the likeliest in the cache.
    STEPS: tl.constexpr = (H + PARTS * AHEAD - 1) // (PARTS * AHEAD)
    row = (STEPS - 1) * AHEAD * PARTS + part
    offset = (pixel + row * W) * WC + w_channel
    for _ in range(STEPS):
        weights = ()
        gradients = ()
        for i in tl.static_range(AHEAD):
            mask = inside & (row + i * PARTS < H)
            for tap in tl.static_range(TAPS):
                at = offset + i * PARTS * W * WC + tap * CW
                weights = weights + (tl.load(w_ptr + at, mask, 0.0),)
                gradients = gradients + (tl.load(dw_ptr + at, mask, 0.0),)
        for i in tl.static_range(AHEAD):
            mask = inside & (row + i * PARTS < H)
            added_scale = ()
            added_bias = ()
            for tap in tl.static_range(TAPS):
                difference = weights[i * TAPS + tap].to(tl.float32) - mean
                gradient = gradients[i * TAPS + tap].to(tl.float32)
                added_scale = added_scale + (scale_gradients[tap] + gradient * difference,)
                added_bias = added_bias + (bias_gradients[tap] + gradient,)
                raw = gradient * factors[tap] - constant - slope * difference
                raw = raw.to(dw_ptr.dtype.element_ty)
                tl.store(dw_ptr + offset + i * PARTS * W * WC + tap * CW, raw, mask)
            scale_gradients = added_scale
            bias_gradients = added_bias
        row -= AHEAD * PARTS
        offset -= AHEAD * PARTS * W * WC
    one = inside & (column == 0) & (part == 0)
    parameters = parameters_ptr + (picture * G + group) * (TAPS * CW) + channel
    PROGRAMS: tl.constexpr = G * ((CW + SLICE - 1) // SLICE)
    count = (tl.num_programs(0) // PROGRAMS).to(tl.int64) * (G * TAPS * CW)
    for tap in tl.static_range(TAPS):
        scale_gradient = _sum(scale_gradients[tap] * factor, PADDED, BLOCK)
        tl.store(parameters + tap * CW, scale_gradient, one)
        bias_gradient = _sum(bias_gradients[tap], PADDED, BLOCK)
        tl.store(parameters + count + tap * CW, bias_gradient, one)
