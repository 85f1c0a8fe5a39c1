"""The backward kernel of local aggregation; importable only where triton is.

A lane sees its pixel p as a value that its neighbours q read. With dy[q] it has
dx[p] = sum over taps of w[q, tap] dy[q], and dw[q, tap] = sum over shares of x[p] dy[q]: both
gradients from the same loads. q lies at the tap's mirror image: tap column j is column K - 1 - j.

Lanes and rows are those of ``forward_kernel``; so are the shapes, with dx as x, dy as y, dw as w.
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
from cotnet_jax.ops.local_aggregation.triton.shared_memory import pack, put


class BackwardPointers(NamedTuple):
    """Arrays that ``walk_backward`` reads and writes."""

    x: tl.tensor
    w: tl.tensor
    dy: tl.tensor
    dx: tl.tensor


class Slots(NamedTuple):
    """The weights that each lane reads, by tap column.

    Attributes:
      offsets: how far each lies from the first weight of the lane's pixel.
      exist: whether it exists.
    """

    offsets: tl.tuple
    exist: tl.tuple


class WeightNormalization(NamedTuple):
    """What ``walk_backward`` must know of the normalisation.

    Attributes:
      mean: of each lane's weight.
      factors, shifts: as ``normalization_coefficients`` gives them, by slot.
    """

    mean: tl.tensor
    factors: tl.tuple
    shifts: tl.tuple


class StoringLanes(NamedTuple):
    """The lanes that store dw: one for each weight.

    Attributes:
      dw: pointers into the row K // 2 above the first.
      column, near, inside: as of ``Lanes``.
    """

    dw: tl.tensor
    column: tl.tensor
    near: tl.tuple
    inside: tl.tensor


@triton.jit
def weight_slots(near, inside, SHAPE, TURNED: tl.constexpr):
    """Return the ``Slots`` of lanes.

    A slot is a weight of the neighbour that reads the lane's value, at the tap's mirror image.
    TURNED: where that lies beside the image, the lane has the weight of its own pixel that looks
    there, so that all weights of an image have a lane.
    """
    K: tl.constexpr = SHAPE.kernel_size
    offsets = ()
    exist = ()
    for j in tl.static_range(K):
        offset = (K // 2 - j) * SHAPE.pixel_weights + j * SHAPE.channels
        if TURNED and j != K // 2:
            offset = tl.where(near[K - 1 - j], offset, (K - 1 - j) * SHAPE.channels)
        offsets = offsets + (offset,)
        exist = exist + (inside if TURNED else near[K - 1 - j],)
    return Slots(offsets, exist)


@triton.jit
def _load_row(
    dy, w, x, slots, near, inside, r, first, last, SHAPE, STEP, U: tl.constexpr, WHOLE
):  # fmt: skip
    """Return what one step of ``walk_backward`` reads: weights by tap, then for each share K
    columns of dy and the new row of x. WHOLE: all weights of the chunk's rows, used for dx or
    not."""
    K: tl.constexpr = SHAPE.kernel_size
    HALF: tl.constexpr = K // 2
    here = (r >= 0) & (r < SHAPE.h) & (r < last + HALF)
    loaded = ()
    for i in tl.static_range(K):
        h = r + (i - HALF)
        used = here & (h >= first) & (h < last)
        if WHOLE:
            used = used | ((r >= first) & (r < last))
        for j in tl.static_range(K):
            offset = slots.offsets[j] + i * (K * SHAPE.channels)
            loaded = loaded + (tl.load(w + offset, slots.exist[j] & used, 0.0),)
    for u in tl.static_range(U):
        for j in tl.static_range(K):
            offset = (HALF - j) * SHAPE.pixel_values + u * STEP
            loaded = loaded + (tl.load(dy + offset, near[K - 1 - j] & here, 0.0),)
        there = inside & (r + HALF < SHAPE.h) & (r < last)
        loaded = loaded + (tl.load(x + u * STEP, there, 0.0),)
    return loaded


@triton.jit
def walk_backward(
    pointers,
    normalization,
    lanes,
    near,
    x_channel,
    slots,
    storing,
    kept,
    first,
    last,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Write rows ``first`` to ``last`` of dx, and those of dw.

    Args:
      pointers: ``BackwardPointers``.
      normalization: ``WeightNormalization``.
      lanes, near, x_channel: as in ``walk_forward``.
      slots: of the lanes, as ``weight_slots`` gives them.
      storing: ``StoringLanes``. With more than one part the lanes of a weight lie Cw apart, and one
        of them stores the sum over all.
      kept: with KEEP dw is not stored but kept at this address, by row and tap in one word with w.

    Returns:
      For every lane the sums over its rows and taps of dw * factors, and of that times w - mean.
    """
    K: tl.constexpr = SHAPE.kernel_size
    HALF: tl.constexpr = K // 2
    C: tl.constexpr = SHAPE.pixel_values
    WC: tl.constexpr = SHAPE.pixel_weights
    CW: tl.constexpr = SHAPE.channels
    H: tl.constexpr = SHAPE.h
    W: tl.constexpr = SHAPE.w
    # A lane has U value channels, STEP apart.
    PARTS: tl.constexpr = CONFIG.parts
    U: tl.constexpr = SHAPE.share // PARTS
    STEP: tl.constexpr = PARTS * CW
    ROWS: tl.constexpr = CONFIG.rows
    BLOCK: tl.constexpr = CONFIG.block
    PREFETCH: tl.constexpr = CONFIG.prefetch
    inside = lanes.inside
    if not KEEP:
        dw = storing.dw
    # Pointers to row r of dy and w, to row r + HALF of x, the lowest that reads row r, and to
    # row r - HALF of dx, the one that row r completes.
    start = lanes.pixel + (first - HALF) * W
    dy = pointers.dy + start * C + x_channel
    w = pointers.w + start * WC + (lanes.group * (K * K * CW) + lanes.channel)
    x = pointers.x + start * C + x_channel + HALF * W * C
    dx = pointers.dx + start * C + x_channel - HALF * W * C
    dx_dtype = pointers.dx.dtype.element_ty
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    weight_product = tl.zeros((BLOCK,), tl.float32)
    sums = ()
    values = ()
    for u in tl.static_range(U):
        for k in tl.static_range(K - 1):
            sums = sums + (tl.zeros((BLOCK,), tl.float32),)
            row = first - 2 * HALF + k
            mask = inside & (row >= 0) & (row < H)
            values = values + (tl.load(x + (k - 2 * HALF) * W * C + u * STEP, mask, 0.0),)

    # fmt: off
    if PREFETCH:
        loaded = _load_row(dy, w, x, slots, near, inside, first - HALF, first, last, SHAPE, STEP, U,
                           NORMALIZE)
    for step in range(ROWS + 2 * HALF):
        r = first - HALF + step
        own = (r >= first) & (r < last)
        if PREFETCH:
            current = loaded
            loaded = _load_row(dy + W * C, w + W * WC, x + W * C, slots, near, inside, r + 1, first,
                               last, SHAPE, STEP, U, NORMALIZE)
        else:
            current = _load_row(dy, w, x, slots, near, inside, r, first, last, SHAPE, STEP, U,
                                NORMALIZE)
        # fmt: on
        weights = ()
        for tap in tl.static_range(K * K):
            weight = current[tap].to(tl.float32)
            if NORMALIZE:
                weight = weight * normalization.factors[tap] + normalization.shifts[tap]
            weights = weights + (weight,)
        gradients = ()
        carried_sums = ()
        carried_values = ()
        finished = ()
        for u in tl.static_range(U):
            updated = ()
            for i in tl.static_range(K):
                source = current[K * K + u * (K + 1)].to(tl.float32)
                if i < K - 1:
                    value = values[u * (K - 1) + i]
                    total = sums[u * (K - 1) + i] + weights[i * K] * source
                else:
                    value = current[K * K + u * (K + 1) + K]
                    total = weights[i * K] * source
                for j in tl.static_range(K):
                    source = current[K * K + u * (K + 1) + j].to(tl.float32)
                    if j > 0:
                        total += weights[i * K + j] * source
                    if u == 0:
                        updated = updated + (value.to(tl.float32) * source,)
                    else:
                        product = gradients[i * K + j] + value.to(tl.float32) * source
                        updated = updated + (product,)
                if i > 0:
                    carried_sums = carried_sums + (total,)
                    carried_values = carried_values + (value,)
                else:
                    finished = finished + (total.to(dx_dtype),)
            gradients = updated
        mask = inside & (r - HALF >= first) & (r - HALF < last)
        for u in tl.static_range(U):
            tl.store(dx + u * STEP, finished[u], mask)
        if NORMALIZE:
            total = gradients[0] * normalization.factors[0]
            product = total * (current[0].to(tl.float32) - normalization.mean)
            for tap in tl.static_range(1, K * K):
                gradient = gradients[tap] * normalization.factors[tap]
                total += gradient
                product += gradient * (current[tap].to(tl.float32) - normalization.mean)
            weight_sum += tl.where(own, total, 0.0)
            weight_product += tl.where(own, product, 0.0)
        if KEEP:
            if own:
                for tap in tl.static_range(K * K):
                    word = pack(gradients[tap].to(pointers.w.dtype.element_ty), current[tap])
                    put(kept + tap * (BLOCK * 4), word)
                kept += K * K * BLOCK * 4
        else:
            for tap in tl.static_range(K * K):
                gradient = gradients[tap]
                if PARTS > 1:
                    gradient = tl.reshape(gradient, (BLOCK // (PARTS * CW), PARTS, CW))
                    gradient = tl.reshape(tl.sum(gradient, 1), (BLOCK // PARTS,))
                gradient = gradient.to(storing.dw.dtype.element_ty)
                offset = (HALF - tap % K) * WC + tap * CW
                tl.store(dw + offset, gradient, storing.near[K - 1 - tap % K] & own)
                if tap % K != HALF:
                    # Taps that look beside the image belong to no lane's pixel: zero.
                    beside = storing.column + (tap % K - HALF)
                    beside = storing.inside & own & ((beside < 0) | (beside >= W))
                    tl.store(dw + tap * CW, tl.zeros_like(gradient), beside)
            dw += W * WC
        sums = carried_sums
        values = carried_values
        dy += W * C
        w += W * WC
        x += W * C
        dx += W * C
    return weight_sum, weight_product


@triton.jit
def backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    dw_ptr,
    sums_ptr,
    N: tl.constexpr,
    SHAPE: tl.constexpr,
    CONFIG: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Write dx and dw from x, w and dy.

    NORMALIZE: for weights normalised as in ``forward``. dw is then the gradient of the normalised
    weights, and partial sums are left for the gradient of the normalisation: of dw * scale * rstd,
    and of that times w - mean, over a lane's rows and taps, sums [2, N, W, chunks of rows, parts,
    G, Cw] float32. Pointers that the option leaves out are neither read nor written.

    SHAPE is an ``AggregationShape``, CONFIG an ``AggregationConfig``.
    """
    G: tl.constexpr = SHAPE.groups
    K: tl.constexpr = SHAPE.kernel_size
    CW: tl.constexpr = SHAPE.channels
    WC: tl.constexpr = SHAPE.pixel_weights
    W: tl.constexpr = SHAPE.w
    PARTS: tl.constexpr = CONFIG.parts
    block, first = locate_program(N, SHAPE, CONFIG, False)
    lanes = locate_lanes(block, N, SHAPE, PARTS, CONFIG.block)
    group = lanes.group
    channel = lanes.channel
    near = near_columns(lanes.column, lanes.inside, SHAPE)
    w_channel = group * (K * K * CW) + channel
    slots = weight_slots(near, lanes.inside, SHAPE, False)
    start = (first - K // 2) * W
    if PARTS == 1:
        dw = dw_ptr + (lanes.pixel + start) * WC + w_channel
        storing = StoringLanes(dw, lanes.column, near, lanes.inside)
    else:
        # One lane in PARTS stores the sum over the parts.
        few = locate_lanes(block, N, SHAPE, 1, CONFIG.block // PARTS)
        dw = dw_ptr + (few.pixel + start) * WC + few.group * (K * K * CW) + few.channel
        few_near = near_columns(few.column, few.inside, SHAPE)
        storing = StoringLanes(dw, few.column, few_near, few.inside)
    normalization = WeightNormalization(0.0, (), ())
    # fmt: off
    if NORMALIZE:
        pointers = Normalization(mean_ptr, rstd_ptr, scale_ptr, bias_ptr)
        statistics = load_statistics(pointers, lanes.image, group, channel, lanes.inside, SHAPE)
        factors, shifts = normalization_coefficients(statistics, group, channel, near, lanes.inside,
                                                     SHAPE, False)
        normalization = WeightNormalization(statistics.mean, factors, shifts)
    weight_sum, weight_product = walk_backward(
        BackwardPointers(x_ptr, w_ptr, dy_ptr, dx_ptr), normalization, lanes, near,
        group * (SHAPE.share * CW) + lanes.part * CW + channel, slots, storing, None, first,
        tl.minimum(first + CONFIG.rows, SHAPE.h), SHAPE, CONFIG, NORMALIZE, False)
    # fmt: on
    if NORMALIZE:
        CHUNKS: tl.constexpr = (SHAPE.h + CONFIG.rows - 1) // CONFIG.rows
        index = lanes.image.to(tl.int64) * W + lanes.column
        index = ((index * CHUNKS + first // CONFIG.rows) * PARTS + lanes.part) * G + group
        sums = sums_ptr + index * CW + channel
        tl.store(sums, weight_sum, lanes.inside)
        tl.store(sums + N * W * CHUNKS * G * PARTS * CW, weight_product, lanes.inside)
