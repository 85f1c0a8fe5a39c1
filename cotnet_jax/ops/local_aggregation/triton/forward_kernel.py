"""The forward kernel of local aggregation; importable only where triton is.

Each lane walks down a chunk of rows of its column. Each value is loaded for its three columns, not
for its nine taps: the sums of the rows above and below are carried in registers. All that a row
needs is loaded before anything is stored, because the compiler moves no load over a store.

Shapes: x and y [N, H, W, C], w [N, H, W, G, K*K, Cw], where C is G * share * Cw.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from cotnet_jax.ops.local_aggregation.triton.lanes import (
    Normalization,
    load_statistics,
    locate_lanes,
    locate_program,
    near_columns,
    normalization_coefficients,
)
from cotnet_jax.ops.local_aggregation.triton.shared_memory import get, pack, put, unpack


class ForwardPointers(NamedTuple):
    """Arrays that ``walk_forward`` reads and writes.

    Attributes:
      x, w: values and weights.
      output_scale, output_shift: of the epilogue, [C] float32.
      y: result.
    """

    x: tl.tensor
    w: tl.tensor
    output_scale: tl.tensor
    output_shift: tl.tensor
    y: tl.tensor


class Kept(NamedTuple):
    """What a program has read before its walk.

    Attributes:
      address: where ``keep_weights`` has kept the weights of its rows.
      first_row: values of the first row, as ``load_values`` gives them, with prefetch.
    """

    address: tl.tensor
    first_row: tl.tuple


@triton.jit
def _load_row(x, w, near, inside, r, first, last, SHAPE, STEP, U, KEPT):
    """Return what one step of ``walk_forward`` reads: weights by row of y and tap column, unless
    they are KEPT, then values by share and column."""
    K: tl.constexpr = SHAPE.kernel_size
    HALF: tl.constexpr = K // 2
    loaded = ()
    if not KEPT:
        for slot in tl.static_range(K):
            # Row r of x is tap row K - 1 - slot of row r - HALF + slot of y.
            h = r + (slot - HALF)
            mask = inside & (h >= first) & (h < last)
            for j in tl.static_range(K):
                offset = (slot - HALF) * SHAPE.w * SHAPE.pixel_weights
                offset = offset + ((K - 1 - slot) * K + j) * SHAPE.channels
                loaded = loaded + (tl.load(w + offset, mask, 0.0),)
    return loaded + load_values(x, near, r, last, SHAPE, STEP, U)


@triton.jit
def load_values(x, near, r, last, SHAPE, STEP, U: tl.constexpr):
    """Return the values at ``x``, in row r, and beside them: by share and column."""
    K: tl.constexpr = SHAPE.kernel_size
    HALF: tl.constexpr = K // 2
    here = (r >= 0) & (r < SHAPE.h) & (r < last + HALF)
    loaded = ()
    for u in tl.static_range(U):
        for j in tl.static_range(K):
            at = x + (j - HALF) * SHAPE.pixel_values + u * STEP
            loaded = loaded + (tl.load(at, near[j] & here, 0.0),)
    return loaded


@triton.jit
def keep_weights(kept, row, weights, BLOCK: tl.constexpr, K: tl.constexpr):
    """Keep the K*K weights of a chunk's row for ``_kept_weights``, two of a tap row in a word."""
    WORDS: tl.constexpr = (K + 1) // 2
    at = kept + row * (K * WORDS * BLOCK * 4)
    for i in tl.static_range(K):
        for j in tl.static_range(0, K, 2):
            low = weights[i * K + j]
            high = weights[i * K + min(j + 1, K - 1)]
            put(at + (i * WORDS + j // 2) * (BLOCK * 4), pack(low, high))


@triton.jit
def _kept_weights(kept, step, DTYPE: tl.constexpr, ROWS, BLOCK: tl.constexpr, K: tl.constexpr):
    """Return the weights as ``_load_row`` does, but any for rows of y outside the chunk."""
    WORDS: tl.constexpr = (K + 1) // 2
    weights = ()
    for slot in tl.static_range(K):
        row = tl.minimum(tl.maximum(step - K + 1 + slot, 0), ROWS - 1)
        at = kept + (row * K + (K - 1 - slot)) * (WORDS * BLOCK * 4)
        for j in tl.static_range(0, K, 2):
            low, high = unpack(get(at + j // 2 * (BLOCK * 4)), DTYPE)
            weights = weights + (low,)
            if j + 1 < K:
                weights = weights + (high,)
    return weights


@triton.jit
def walk_forward(
    pointers,
    normalization,
    lanes,
    near,
    x_channel,
    kept,
    first,
    last,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Write rows ``first`` to ``last`` of y.

    Args:
      pointers: ``ForwardPointers``.
      normalization: with NORMALIZE, of each lane's weight, as ``load_statistics`` gives it.
      lanes, near: as ``locate_lanes`` and ``near_columns`` give them.
      x_channel: the first of each lane's value channels.
      kept: with KEPT, the weights (and with prefetch the first values) as ``Kept``; they are not
        loaded again.
    """
    K: tl.constexpr = SHAPE.kernel_size
    HALF: tl.constexpr = K // 2
    C: tl.constexpr = SHAPE.pixel_values
    WC: tl.constexpr = SHAPE.pixel_weights
    CW: tl.constexpr = SHAPE.channels
    W: tl.constexpr = SHAPE.w
    # A lane has U value channels, STEP apart.
    U: tl.constexpr = SHAPE.share // CONFIG.parts
    STEP: tl.constexpr = CONFIG.parts * CW
    ROWS: tl.constexpr = CONFIG.rows
    BLOCK: tl.constexpr = CONFIG.block
    PREFETCH: tl.constexpr = CONFIG.prefetch
    # Scale and bias are loaded for every row, from the cache, and take no registers between.
    RELOAD: tl.constexpr = NORMALIZE and CONFIG.reload
    inside = lanes.inside
    loaded = ()
    if KEPT:
        loaded = kept.first_row
    # Pointers to row r of x and w, and to row r - HALF of y, the one that row r completes.
    start = lanes.pixel + (first - HALF) * W
    x = pointers.x + start * C + x_channel
    w = pointers.w + start * WC + lanes.group * (K * K * CW) + lanes.channel
    y = pointers.y + start * C + x_channel - HALF * W * C
    y_dtype = pointers.y.dtype.element_ty
    sums = ()
    for _ in tl.static_range(U * (K - 1)):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)

    if RELOAD:
        scale = normalization.scale + lanes.group * (K * K * CW) + lanes.channel
        bias = normalization.bias + lanes.group * (K * K * CW) + lanes.channel
        shift = normalization.mean * normalization.rstd
    elif NORMALIZE:
        factors, shifts = normalization_coefficients(
            normalization, lanes.group, lanes.channel, near, inside, SHAPE, False
        )
    if PREFETCH and not KEPT:
        loaded = _load_row(x, w, near, inside, first - HALF, first, last, SHAPE, STEP, U, KEPT)
    for step in range(ROWS + 2 * HALF):
        r = first - HALF + step
        if PREFETCH:
            current = loaded
            loaded = _load_row(
                *(x + W * C, w + W * WC, near, inside, r + 1, first, last, SHAPE, STEP, U, KEPT)
            )
        else:
            current = _load_row(x, w, near, inside, r, first, last, SHAPE, STEP, U, KEPT)
        if KEPT:
            w_dtype: tl.constexpr = pointers.w.dtype.element_ty
            weights = _kept_weights(kept.address, step, w_dtype, ROWS, BLOCK, K)
            current = weights + current
        weights = ()
        for slot in tl.static_range(K):
            for j in tl.static_range(K):
                weight = current[slot * K + j].to(tl.float32)
                if RELOAD:
                    offset = ((K - 1 - slot) * K + j) * CW
                    weight = weight * normalization.rstd - shift
                    weight *= tl.load(scale + offset, inside, 0.0)
                    weight += tl.load(bias + offset, inside, 0.0)
                elif NORMALIZE:
                    weight *= factors[(K - 1 - slot) * K + j]
                    weight += shifts[(K - 1 - slot) * K + j]
                weights = weights + (weight,)
        carried = ()
        finished = ()
        for u in tl.static_range(U):
            for slot in tl.static_range(K):
                value = current[K * K + u * K].to(tl.float32)
                if slot < K - 1:
                    total = sums[u * (K - 1) + slot] + weights[slot * K] * value
                else:
                    total = weights[slot * K] * value
                for j in tl.static_range(1, K):
                    total += weights[slot * K + j] * current[K * K + u * K + j].to(tl.float32)
                if slot > 0:
                    carried = carried + (total,)
                else:
                    if ACTIVATE:
                        c = x_channel + u * STEP
                        output_scale = tl.load(pointers.output_scale + c, inside, 0.0)
                        output_shift = tl.load(pointers.output_shift + c, inside, 0.0)
                        total = total * output_scale + output_shift
                        total = total * tl.sigmoid(total)
                    finished = finished + (total.to(y_dtype),)
        mask = inside & (r - HALF >= first) & (r - HALF < last)
        for u in tl.static_range(U):
            tl.store(y + u * STEP, finished[u], mask)
        sums = carried
        x += W * C
        w += W * WC
        y += W * C


@triton.jit
def forward(
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    N: tl.constexpr,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Write y, the aggregation of x with w.

    NORMALIZE: with (w - mean) * rstd * scale + bias in place of w; mean and rstd [N, G, Cw], scale
    and bias [G, K*K, Cw] float32. ACTIVATE: with the epilogue SiLU(output_scale * y +
    output_shift); both [C] float32. Pointers that the options leave out are not read.

    SHAPE is an ``AggregationShape``, CONFIG an ``AggregationConfig``.
    """
    block, first = locate_program(N, SHAPE, CONFIG, NORMALIZE)
    lanes = locate_lanes(block, N, SHAPE, CONFIG.parts, CONFIG.block)
    normalization = Normalization(mean_ptr, rstd_ptr, scale_ptr, bias_ptr)
    if NORMALIZE:
        normalization = load_statistics(
            normalization, lanes.image, lanes.group, lanes.channel, lanes.inside, SHAPE
        )
    CW: tl.constexpr = SHAPE.channels
    walk_forward(
        ForwardPointers(x_ptr, w_ptr, output_scale_ptr, output_shift_ptr, y_ptr),
        normalization,
        lanes,
        near_columns(lanes.column, lanes.inside, SHAPE),
        lanes.group * (SHAPE.share * CW) + lanes.part * CW + lanes.channel,
        None,
        first,
        tl.minimum(first + CONFIG.rows, SHAPE.h),
        SHAPE,
        CONFIG,
        False,
        NORMALIZE,
        ACTIVATE,
    )
