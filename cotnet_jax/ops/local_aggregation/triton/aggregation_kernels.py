"""Triton kernels of local aggregation; importable only where triton is.

In the aggregation kernels a lane owns one weight channel of one column of one picture, and the
channels of the values that share it. It walks down ``ROWS`` rows of its column. Each value is
loaded for its three columns, not for its nine taps: the sums of the rows above and below are
carried in registers. Lanes are laid out flat, weight channel fastest and pictures end to end, so
that no channel count and no width leaves lanes idle or needs a power of two. All that a row needs
is loaded before anything is stored, because the compiler moves no load over a store.

Shapes as in ``aggregation``: x, y, dx, dy [N, H, W, C]; w, dw [N, H, W, G, K*K, CW], where C is
G * SHARE * CW. COLUMNS is N * W. With PARTS > 1 the shares of a weight are spread over that many
lanes.
"""

import triton
import triton.language as tl

from cotnet_jax.ops.local_aggregation.triton.shared_memory import get, pack, put, unpack


@triton.jit
def _tile(COLUMNS, H, PER_COLUMN, ROWS, BLOCK, BACKWARDS):
    """Number of this program's lanes' tile, and its first row; row chunks run fastest, so that
    neighbouring chunks read their common rows at about the same time, through the cache.
    BACKWARDS: last pictures first, which a kernel before has left in the cache."""
    CHUNKS: tl.constexpr = (H + ROWS - 1) // ROWS
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    tile = program // CHUNKS
    if COLUMNS * PER_COLUMN >= 2**31 - BLOCK:
        tile = tile.to(tl.int64)
    return tile, (program % CHUNKS) * ROWS


@triton.jit
def _lanes(tile, COLUMNS, H, W, G, PARTS, CW, BLOCK: tl.constexpr):
    """Where each lane is: its pixel in row 0, column, picture, group, part and weight channel."""
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    index = lane // (G * PARTS * CW)
    picture = index // W
    column = index % W
    pixel = picture.to(tl.int64) * (H * W) + column
    group = (lane // (PARTS * CW)) % G
    part = (lane // CW) % PARTS
    return pixel, column, picture, group, part, lane % CW, index < COLUMNS


@triton.jit
def near_columns(column, inside, W, K: tl.constexpr):
    """For each of K columns around a lane's own, whether it lies in the picture."""
    near = ()
    for j in tl.static_range(K):
        near = near + (inside & (column + (j - K // 2) >= 0) & (column + (j - K // 2) < W),)
    return near


@triton.jit
def load_statistics(mean_ptr, factor_ptr, picture, group, channel, inside, G, CW):
    """Mean and factor [N, G, CW] float32 of each lane's group of weights."""
    index = (picture.to(tl.int64) * G + group) * CW + channel
    mean = tl.load(mean_ptr + index, inside, 0.0)
    return mean, tl.load(factor_ptr + index, inside, 0.0)


@triton.jit
def _tap_of_slot(near, slot, K: tl.constexpr, TURNED: tl.constexpr):
    """The tap of a lane's weight, by its row and column as ``weight_slots`` has them."""
    if TURNED and slot % K != K // 2:
        turned = slot // K * K + K - 1 - slot % K
        tap = tl.where(near[K - 1 - slot % K], slot, turned)
    else:
        tap = slot
    return tap


@triton.jit
def affine(
    mean, factor, scale_ptr, bias_ptr, group, channel, near, inside, CW, K: tl.constexpr, TURNED
):
    """Factor and summand that normalise a weight, for each tap or slot: the weight less its mean,
    times factor, times scale, plus bias, both [G, K*K, CW] float32."""
    factors = ()
    summands = ()
    for slot in tl.static_range(K * K):
        offset = (group * (K * K) + _tap_of_slot(near, slot, K, TURNED)) * CW + channel
        a = tl.load(scale_ptr + offset, inside, 0.0) * factor
        factors = factors + (a,)
        summands = summands + (tl.load(bias_ptr + offset, inside, 0.0) - mean * a,)
    return factors, summands


@triton.jit
def _load_forward(
    x, w, near, inside, r, first, last, H, W, C, WC, CW, STEP, U, K: tl.constexpr, KEPT
):
    """What one step of ``walk_forward`` reads: weights by row of y and tap column, unless they are
    KEPT, then values by share and column."""
    HALF: tl.constexpr = K // 2
    loaded = ()
    if not KEPT:
        for slot in tl.static_range(K):
            # Row r of x is tap row K - 1 - slot of row r - HALF + slot of y.
            h = r + (slot - HALF)
            mask = inside & (h >= first) & (h < last)
            for j in tl.static_range(K):
                offset = (slot - HALF) * W * WC + ((K - 1 - slot) * K + j) * CW
                loaded = loaded + (tl.load(w + offset, mask, 0.0),)
    return loaded + load_values(x, near, r, last, H, C, STEP, U, K)


@triton.jit
def load_values(x, near, r, last, H, C, STEP, U, K: tl.constexpr):
    """The values at ``x``, in row r, and beside them: by share and column."""
    HALF: tl.constexpr = K // 2
    here = (r >= 0) & (r < H) & (r < last + HALF)
    loaded = ()
    for u in tl.static_range(U):
        for j in tl.static_range(K):
            loaded = loaded + (tl.load(x + (j - HALF) * C + u * STEP, near[j] & here, 0.0),)
    return loaded


@triton.jit
def keep_weights(kept, row, weights, BLOCK: tl.constexpr, K: tl.constexpr):
    """Keeps the K*K weights of a chunk's row for ``_kept_weights``, two of a tap row in a word."""
    WORDS: tl.constexpr = (K + 1) // 2
    at = kept + row * (K * WORDS * BLOCK * 4)
    for i in tl.static_range(K):
        for j in tl.static_range(0, K, 2):
            low = weights[i * K + j]
            high = weights[i * K + min(j + 1, K - 1)]
            put(at + (i * WORDS + j // 2) * (BLOCK * 4), pack(low, high))


@triton.jit
def _kept_weights(kept, step, DTYPE: tl.constexpr, ROWS, BLOCK: tl.constexpr, K: tl.constexpr):
    """As the weights of ``_load_forward``, but those of rows of y outside the chunk are any."""
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
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    pixel,
    near,
    inside,
    x_channel,
    group,
    channel,
    mean,
    factor,
    kept,
    loaded,
    first,
    last,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    WC: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    U: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    RELOAD: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Rows ``first`` to ``last`` of y, for lanes whose pixel in row 0 is ``pixel``.

    A lane has the weight channel ``channel`` of ``group``, whose statistics are ``mean`` and
    ``factor``, and U channels of the values, STEP apart from ``x_channel`` on. RELOAD: scale and
    bias are loaded for every row, from the cache, and take no registers between. KEPT: the weights
    are not loaded but were kept by ``keep_weights`` at ``kept``, and with PREFETCH the first row of
    values is ``loaded``.
    """
    HALF: tl.constexpr = K // 2
    # Pointers to row r of x and w, and to row r - HALF of y, the one that row r completes.
    start = pixel + (first - HALF) * W
    x = x_ptr + start * C + x_channel
    w = w_ptr + start * WC + group * (K * K * CW) + channel
    y = y_ptr + start * C + x_channel - HALF * W * C
    sums = ()
    for _ in tl.static_range(U * (K - 1)):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)

    # fmt: off
    if RELOAD:
        scale = scale_ptr + group * (K * K * CW) + channel
        bias = bias_ptr + group * (K * K * CW) + channel
        shift = mean * factor
    elif NORMALIZE:
        factors, summands = affine(mean, factor, scale_ptr, bias_ptr, group, channel, near, inside,
                                   CW, K, False)
    if PREFETCH and not KEPT:
        loaded = _load_forward(x, w, near, inside, first - HALF, first, last, H, W, C, WC, CW,
                               STEP, U, K, KEPT)
    for step in range(ROWS + 2 * HALF):
        r = first - HALF + step
        if PREFETCH:
            current = loaded
            loaded = _load_forward(x + W * C, w + W * WC, near, inside, r + 1, first, last, H, W,
                                   C, WC, CW, STEP, U, K, KEPT)
        else:
            current = _load_forward(x, w, near, inside, r, first, last, H, W, C, WC, CW, STEP, U, K,
                                    KEPT)
        if KEPT:
            current = _kept_weights(kept, step, w_ptr.dtype.element_ty, ROWS, BLOCK, K) + current
        # fmt: on
        weights = ()
        for slot in tl.static_range(K):
            for j in tl.static_range(K):
                weight = current[slot * K + j].to(tl.float32)
                if RELOAD:
                    offset = ((K - 1 - slot) * K + j) * CW
                    weight = weight * factor - shift
                    weight *= tl.load(scale + offset, inside, 0.0)
                    weight += tl.load(bias + offset, inside, 0.0)
                elif NORMALIZE:
                    weight *= factors[(K - 1 - slot) * K + j]
                    weight += summands[(K - 1 - slot) * K + j]
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
                        output_scale = tl.load(output_scale_ptr + c, inside, 0.0)
                        output_shift = tl.load(output_shift_ptr + c, inside, 0.0)
                        total = total * output_scale + output_shift
                        total = total * tl.sigmoid(total)
                    finished = finished + (total.to(y_ptr.dtype.element_ty),)
        mask = inside & (r - HALF >= first) & (r - HALF < last)
        for u in tl.static_range(U):
            tl.store(y + u * STEP, finished[u], mask)
        sums = carried
        x += W * C
        w += W * WC
        y += W * C


@triton.jit
def _forward(
    x_ptr,
    w_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    RELOAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    tile, first = _tile(COLUMNS, H, G * PARTS * CW, ROWS, BLOCK, NORMALIZE)
    pixel, column, picture, group, part, channel, inside = _lanes(
        tile, COLUMNS, H, W, G, PARTS, CW, BLOCK
    )
    mean = 0.0
    factor = 0.0
    # fmt: off
    if NORMALIZE:
        mean, factor = load_statistics(mean_ptr, factor_ptr, picture, group, channel, inside, G, CW)
    walk_forward(x_ptr, w_ptr, scale_ptr, bias_ptr, output_scale_ptr, output_shift_ptr, y_ptr,
                 pixel, near_columns(column, inside, W, K), inside,
                 group * (SHARE * CW) + part * CW + channel, group, channel, mean, factor, 0, (),
                 first, tl.minimum(first + ROWS, H), H, W, G * SHARE * CW, G * K * K * CW, CW, K,
                 PARTS * CW, SHARE // PARTS, ROWS, BLOCK, PREFETCH, RELOAD, False, NORMALIZE,
                 ACTIVATE)
    # fmt: on


@triton.jit
def forward(
    x_ptr,
    w_ptr,
    y_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """y from x and w."""
    # fmt: off
    _forward(x_ptr, w_ptr, None, None, None, None, None, None, y_ptr, COLUMNS, H, W, G, SHARE, CW,
             K, PARTS, ROWS, BLOCK, PREFETCH, False, False, False)
    # fmt: on


@triton.jit
def normalized_forward(
    x_ptr,
    w_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """y from x and normalised weights, (w - mean) * factor * scale + bias."""
    # fmt: off
    _forward(x_ptr, w_ptr, mean_ptr, factor_ptr, scale_ptr, bias_ptr, None, None, y_ptr, COLUMNS, H,
             W, G, SHARE, CW, K, PARTS, ROWS, BLOCK, PREFETCH, RELOAD, True, False)
    # fmt: on


@triton.jit
def activated_forward(
    x_ptr,
    w_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    output_scale_ptr,
    output_shift_ptr,
    y_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """SiLU(output_scale * y + output_shift) of ``normalized_forward``'s y; both [C] float32."""
    # fmt: off
    _forward(x_ptr, w_ptr, mean_ptr, factor_ptr, scale_ptr, bias_ptr, output_scale_ptr,
             output_shift_ptr, y_ptr, COLUMNS, H, W, G, SHARE, CW, K, PARTS, ROWS, BLOCK,
             PREFETCH, RELOAD, True, True)
    # fmt: on


@triton.jit
def weight_slots(near, inside, WC, CW, K: tl.constexpr, TURNED: tl.constexpr):
    """For each tap column, how far a lane's weight lies from its own pixel's first, and whether
    it exists.

    It is a weight of the neighbour that reads the lane's value, at the tap's mirror image. TURNED:
    where that lies beside the picture, the lane has the weight of its own pixel that looks there,
    so that all weights of a picture have a lane.
    """
    offsets = ()
    exist = ()
    for j in tl.static_range(K):
        offset = (K // 2 - j) * WC + j * CW
        if TURNED and j != K // 2:
            offset = tl.where(near[K - 1 - j], offset, (K - 1 - j) * CW)
        offsets = offsets + (offset,)
        exist = exist + (inside if TURNED else near[K - 1 - j],)
    return offsets, exist


@triton.jit
def _load_backward(
    dy, w, offsets, exist, x, near, inside, r, first, last, H, C, CW, STEP, WHOLE, U,
    K: tl.constexpr,
):  # fmt: skip
    """What one step of ``walk_backward`` reads: weights by tap, then for each share K columns of dy
    and the new row of x. WHOLE: all weights of the chunk's rows, used for dx or not."""
    HALF: tl.constexpr = K // 2
    here = (r >= 0) & (r < H) & (r < last + HALF)
    loaded = ()
    for i in tl.static_range(K):
        h = r + (i - HALF)
        used = here & (h >= first) & (h < last)
        if WHOLE:
            used = used | ((r >= first) & (r < last))
        for j in tl.static_range(K):
            offset = offsets[j] + i * (K * CW)
            loaded = loaded + (tl.load(w + offset, exist[j] & used, 0.0),)
    for u in tl.static_range(U):
        for j in tl.static_range(K):
            offset = (HALF - j) * C + u * STEP
            loaded = loaded + (tl.load(dy + offset, near[K - 1 - j] & here, 0.0),)
        loaded = loaded + (tl.load(x + u * STEP, inside & (r + HALF < H) & (r < last), 0.0),)
    return loaded


@triton.jit
def walk_backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    dw,
    pixel,
    near,
    inside,
    x_channel,
    w_channel,
    offsets,
    exist,
    dw_column,
    dw_near,
    dw_inside,
    mean,
    factors,
    summands,
    kept,
    first,
    last,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    WC: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    U: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Rows ``first`` to ``last`` of dx and dw, for lanes as in ``walk_forward``.

    A lane's weights are those of ``weight_slots``. With PARTS > 1 the lanes of a weight lie LANES
    apart, and one in PARTS stores its sum: those at ``dw``, pointers to the row HALF above
    ``first``, in ``dw_column``. KEEP: dw is not stored but kept at ``kept``, by row and tap in one
    word with w. Returns for every lane the sums over its rows and taps of dw * factors, and of that
    times w - mean.
    """
    # A lane sees its pixel p as a value that its neighbours q read. With dy[q] it has
    # dx[p] = sum w[q, tap] dy[q], and dw[q, tap] = sum over shares of x[p] dy[q]: both gradients
    # from the same loads. q lies at the tap's mirror image: tap column j is column K - 1 - j.
    HALF: tl.constexpr = K // 2
    # Pointers to row r of dy and w, to row r + HALF of x, the lowest that reads row r, and to
    # row r - HALF of dx, the one that row r completes.
    start = pixel + (first - HALF) * W
    dy = dy_ptr + start * C + x_channel
    w = w_ptr + start * WC + w_channel
    x = x_ptr + start * C + x_channel + HALF * W * C
    dx = dx_ptr + start * C + x_channel - HALF * W * C
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
        loaded = _load_backward(dy, w, offsets, exist, x, near, inside, first - HALF, first, last,
                                H, C, CW, STEP, NORMALIZE, U, K)
    for step in range(ROWS + 2 * HALF):
        r = first - HALF + step
        own = (r >= first) & (r < last)
        if PREFETCH:
            current = loaded
            loaded = _load_backward(dy + W * C, w + W * WC, offsets, exist, x + W * C, near, inside,
                                    r + 1, first, last, H, C, CW, STEP, NORMALIZE, U, K)
        else:
            current = _load_backward(dy, w, offsets, exist, x, near, inside, r, first, last, H, C,
                                     CW, STEP, NORMALIZE, U, K)
        # fmt: on
        weights = ()
        for tap in tl.static_range(K * K):
            weight = current[tap].to(tl.float32)
            if NORMALIZE:
                weight = weight * factors[tap] + summands[tap]
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
                    finished = finished + (total.to(dx_ptr.dtype.element_ty),)
            gradients = updated
        mask = inside & (r - HALF >= first) & (r - HALF < last)
        for u in tl.static_range(U):
            tl.store(dx + u * STEP, finished[u], mask)
        if NORMALIZE:
            total = gradients[0] * factors[0]
            product = total * (current[0].to(tl.float32) - mean)
            for tap in tl.static_range(1, K * K):
                gradient = gradients[tap] * factors[tap]
                total += gradient
                product += gradient * (current[tap].to(tl.float32) - mean)
            weight_sum += tl.where(own, total, 0.0)
            weight_product += tl.where(own, product, 0.0)
        if KEEP:
            if own:
                for tap in tl.static_range(K * K):
                    word = pack(gradients[tap].to(w_ptr.dtype.element_ty), current[tap])
                    put(kept + tap * (BLOCK * 4), word)
                kept += K * K * BLOCK * 4
        else:
            for tap in tl.static_range(K * K):
                gradient = gradients[tap]
                if PARTS > 1:
                    gradient = tl.reshape(gradient, (BLOCK // (PARTS * LANES), PARTS, LANES))
                    gradient = tl.reshape(tl.sum(gradient, 1), (BLOCK // PARTS,))
                gradient = gradient.to(dw.dtype.element_ty)
                offset = (HALF - tap % K) * WC + tap * CW
                tl.store(dw + offset, gradient, dw_near[K - 1 - tap % K] & own)
                if tap % K != HALF:
                    # Taps that look beside the picture belong to no lane's pixel: zero.
                    beside = dw_column + (tap % K - HALF)
                    beside = dw_inside & own & ((beside < 0) | (beside >= W))
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
def _backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    dw_ptr,
    sums_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    WC: tl.constexpr = G * K * K * CW
    tile, first = _tile(COLUMNS, H, G * PARTS * CW, ROWS, BLOCK, False)
    pixel, column, picture, group, part, channel, inside = _lanes(
        tile, COLUMNS, H, W, G, PARTS, CW, BLOCK
    )
    near = near_columns(column, inside, W, K)
    w_channel = group * (K * K * CW) + channel
    offsets, exist = weight_slots(near, inside, WC, CW, K, False)
    start = (first - K // 2) * W
    if PARTS == 1:
        dw = dw_ptr + (pixel + start) * WC + w_channel
        dw_column = column
        dw_inside = inside
        dw_near = near
    else:
        # One lane in PARTS stores the sum over the parts.
        dw_pixel, dw_column, _, dw_group, _, dw_channel, dw_inside = _lanes(
            tile, COLUMNS, H, W, G, 1, CW, BLOCK // PARTS
        )
        dw = dw_ptr + (dw_pixel + start) * WC + dw_group * (K * K * CW) + dw_channel
        dw_near = near_columns(dw_column, dw_inside, W, K)
    mean = 0.0
    factors = ()
    summands = ()
    # fmt: off
    if NORMALIZE:
        mean, factor = load_statistics(mean_ptr, factor_ptr, picture, group, channel, inside, G, CW)
        factors, summands = affine(mean, factor, scale_ptr, bias_ptr, group, channel, near, inside,
                                   CW, K, False)
    weight_sum, weight_product = walk_backward(
        x_ptr, w_ptr, dy_ptr, dx_ptr, dw, pixel, near, inside,
        group * (SHARE * CW) + part * CW + channel, w_channel, offsets, exist, dw_column, dw_near,
        dw_inside, mean, factors, summands, 0, first, tl.minimum(first + ROWS, H), H, W,
        G * SHARE * CW, WC, CW, K, PARTS * CW, SHARE // PARTS, PARTS, CW, ROWS, BLOCK, PREFETCH,
        NORMALIZE, False)
    # fmt: on
    if NORMALIZE:
        CHUNKS: tl.constexpr = (H + ROWS - 1) // ROWS
        index = picture.to(tl.int64) * W + column
        index = ((index * CHUNKS + first // ROWS) * PARTS + part) * G + group
        sums = sums_ptr + index * CW + channel
        tl.store(sums, weight_sum, inside)
        tl.store(sums + COLUMNS * CHUNKS * G * PARTS * CW, weight_product, inside)


@triton.jit
def backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    dw_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """dx and dw from x, w and dy."""
    # fmt: off
    _backward(x_ptr, w_ptr, dy_ptr, None, None, None, None, dx_ptr, dw_ptr, None, COLUMNS, H,
              W, G, SHARE, CW, K, PARTS, ROWS, BLOCK, PREFETCH, False)
    # fmt: on


@triton.jit
def normalized_backward(
    x_ptr,
    w_ptr,
    dy_ptr,
    mean_ptr,
    factor_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    dw_ptr,
    sums_ptr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    CW: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """dx, and dw in respect of the normalised weights, with sums for the normalisation's gradient.

    The sums are those of dw * scale * factor, and of that times w - mean, over a lane's rows and
    taps: [2, N, W, chunks of rows, PARTS, G, CW] float32.
    """
    # fmt: off
    _backward(x_ptr, w_ptr, dy_ptr, mean_ptr, factor_ptr, scale_ptr, bias_ptr, dx_ptr, dw_ptr,
              sums_ptr, COLUMNS, H, W, G, SHARE, CW, K, PARTS, ROWS, BLOCK, PREFETCH, True)
    # fmt: on
