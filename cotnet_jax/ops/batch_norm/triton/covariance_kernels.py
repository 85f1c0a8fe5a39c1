"""Triton kernels of a 1x1 convolution whose batch normalisation comes from its input's covariance.

Rows are the pixels of a batch, ROWS of them, with K channels in and N out; an image has PIXELS
rows. A program has CONFIG.rows rows at a time. Products are of the arrays' dtype, sums of float32.
"""

import triton
import triton.language as tl


@triton.jit
def moments(
    x_ptr,
    sums_ptr,
    products_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """Write partial sums of x, [SLOTS, K], and of x^T x, [SLOTS, K, K], both float32.

    A program has every SLOTS-th block of rows, and a square of CONFIG.columns of x^T x.
    """
    COLUMNS: tl.constexpr = CONFIG.columns
    BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    program = tl.program_id(0)
    slot = program // (BLOCKS * BLOCKS)
    row, column = tl.arange(0, CONFIG.rows), tl.arange(0, COLUMNS)
    i = (program // BLOCKS % BLOCKS) * COLUMNS + column
    j = (program % BLOCKS) * COLUMNS + column
    total = tl.zeros((COLUMNS,), tl.float32)
    products = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        left = _load(x_ptr, first + row, i, ROWS, K)
        right = left
        if BLOCKS > 1:
            right = _load(x_ptr, first + row, j, ROWS, K)
        products = tl.dot(tl.trans(left), right, products)
        total += tl.sum(right.to(tl.float32), 0)
    tl.store(sums_ptr + slot * K + j, total, j < K)
    place = products_ptr + slot.to(tl.int64) * (K * K) + i[:, None] * K + j[None, :]
    tl.store(place, products, (i < K)[:, None] & (j < K)[None, :])


@triton.jit
def affine(
    x_ptr,
    kernel_ptr,
    shift_ptr,
    residual_ptr,
    branch_scale_ptr,
    y_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
    PIXELS: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Write ``x @ kernel + shift``, times the branch scale, plus the residual, under the ReLU.

    The constants say which of these there are. A program has every SLOTS-th block of rows, and
    CONFIG.columns of the N channels.
    """
    LANES: tl.constexpr = triton.next_power_of_2(K)
    COLUMNS: tl.constexpr = CONFIG.columns
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    program = tl.program_id(0)
    slot = program // BLOCKS
    row, k = tl.arange(0, CONFIG.rows), tl.arange(0, LANES)
    n = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    kernel = _load(kernel_ptr, k, n, K, N)
    shift = tl.load(shift_ptr + n, n < N, 0.0)[None, :]
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        rows = first + row
        x = _load(x_ptr, rows, k, ROWS, K)
        y = tl.dot(x, kernel) + shift
        if SCALED:
            y *= tl.load(branch_scale_ptr + rows // PIXELS, rows < ROWS, 0.0)[:, None]
        if RESIDUAL:
            y += _load(residual_ptr, rows, n, ROWS, N).to(tl.float32)
        if RELU:
            # NaN stays.
            y = tl.where(y < 0, 0.0, y)
        _store(y_ptr, y.to(x.dtype), rows, n, ROWS, N)


@triton.jit
def gradient_products(
    gradient_ptr,
    x_ptr,
    output_ptr,
    branch_scale_ptr,
    sums_ptr,
    products_ptr,
    masked_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
    PIXELS: tl.constexpr,
    RELU: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Write partial sums of g, [SLOTS, N], and of x^T g, [SLOTS, K, N], both float32.

    g is the gradient, with RELU where the output is positive, which is written too, and with SCALED
    times the branch scale. A program is as in ``affine``.
    """
    LANES: tl.constexpr = triton.next_power_of_2(K)
    COLUMNS: tl.constexpr = CONFIG.columns
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    program = tl.program_id(0)
    slot = program // BLOCKS
    row, k = tl.arange(0, CONFIG.rows), tl.arange(0, LANES)
    n = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    products = tl.zeros((LANES, COLUMNS), tl.float32)
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        rows = first + row
        g = _load(gradient_ptr, rows, n, ROWS, N)
        if RELU:
            g = tl.where(_load(output_ptr, rows, n, ROWS, N) > 0, g, 0.0)
            _store(masked_ptr, g, rows, n, ROWS, N)
        x = _load(x_ptr, rows, k, ROWS, K)
        if SCALED:
            scale = tl.load(branch_scale_ptr + rows // PIXELS, rows < ROWS, 0.0)[:, None]
            g = (g.to(tl.float32) * scale).to(x.dtype)
        products = tl.dot(tl.trans(x), g, products)
        total += tl.sum(g.to(tl.float32), 0)
    tl.store(sums_ptr + slot * N + n, total, n < N)
    place = products_ptr + slot.to(tl.int64) * (K * N) + k[:, None] * N + n[None, :]
    tl.store(place, products, (k < K)[:, None] & (n < N)[None, :])


@triton.jit
def input_gradient(
    g_ptr,
    x_ptr,
    transposed_ptr,
    square_ptr,
    shift_ptr,
    branch_scale_ptr,
    other_ptr,
    y_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    CONFIG: tl.constexpr,
    PIXELS: tl.constexpr,
    SCALED: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Write ``g @ transposed + x @ square + shift``, with OTHER plus another array.

    ``transposed`` is [N, K] and ``square`` [K, K]; with SCALED the branch scale multiplies g. A
    program has a block of rows, and CONFIG.columns of the K channels.
    """
    COLUMNS: tl.constexpr = CONFIG.columns
    BLOCK_ROWS: tl.constexpr = CONFIG.rows
    BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    rows = (program // BLOCKS).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, CONFIG.depth)
    y = tl.zeros((BLOCK_ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, N, CONFIG.depth, num_stages=CONFIG.num_stages):
        g = _load(g_ptr, rows, first + part, ROWS, N)
        y = tl.dot(g, _load(transposed_ptr, first + part, column, N, K), y)
    if SCALED:
        y *= tl.load(branch_scale_ptr + rows // PIXELS, rows < ROWS, 0.0)[:, None]
    for first in tl.range(0, K, CONFIG.depth, num_stages=CONFIG.num_stages):
        x = _load(x_ptr, rows, first + part, ROWS, K)
        y = tl.dot(x, _load(square_ptr, first + part, column, K, K), y)
    y += tl.load(shift_ptr + column, column < K, 0.0)[None, :]
    if OTHER:
        y += _load(other_ptr, rows, column, ROWS, K).to(tl.float32)
    _store(y_ptr, y.to(x_ptr.dtype.element_ty), rows, column, ROWS, K)


@triton.jit
def _place(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers into an array [ROWS, COLUMNS], and which of them are inside."""
    place = pointer + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    return place, (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]


@triton.jit
def _load(pointer, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load rows and columns of an array [ROWS, COLUMNS]; zeros outside."""
    place, inside = _place(pointer, rows, columns, ROWS, COLUMNS)
    return tl.load(place, inside, 0.0)


@triton.jit
def _store(pointer, values, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place, inside = _place(pointer, rows, columns, ROWS, COLUMNS)
    tl.store(place, values, inside)
