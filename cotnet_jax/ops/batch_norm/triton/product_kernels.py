"""Triton kernels of a 1x1 convolution together with the batch normalisation after it.

Rows are the pixels of a batch, ROWS of them, with K channels in and N out. A program has every
SLOTS-th block of the rows with all of their channels, and the small kernel [K, N] stays in fast
memory, so that everything is read once. Products are of the arrays' dtype, sums of float32.
"""

import triton
import triton.language as tl

from cotnet_jax.ops.batch_norm.triton.sums_kernels import times_slope


@triton.jit
def forward(
    x_ptr,
    kernel_ptr,
    y_ptr,
    sums_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """Write y = x @ kernel, and partial sums of y and of its squares, [SLOTS, 2, N] float32.

    A program has CONFIG.columns of the N channels.
    """
    LANES: tl.constexpr = triton.next_power_of_2(K)
    COLUMNS: tl.constexpr = CONFIG.columns
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    program = tl.program_id(0)
    slot = program // BLOCKS
    row, k = tl.arange(0, CONFIG.rows), tl.arange(0, LANES)
    n = (program % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    kernel = tl.load(
        kernel_ptr + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], 0.0
    )
    total = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        there = first + row < ROWS
        start = tl.cast(first, tl.int64)
        x = tl.load(
            x_ptr + start * K + (row[:, None] * K + k[None, :]),
            there[:, None] & (k < K)[None, :],
            0.0,
        )
        y = tl.dot(x, kernel).to(x.dtype)
        y_place = y_ptr + start * N + (row[:, None] * N + n[None, :])
        tl.store(y_place, y, there[:, None] & (n < N)[None, :])
        y = y.to(tl.float32)
        total += tl.sum(y, 0)
        square += tl.sum(y * y, 0)
    place = sums_ptr + slot * (2 * N) + n
    tl.store(place, total, n < N)
    tl.store(place + N, square, n < N)


@triton.jit
def backward(
    gradient_ptr,
    y_ptr,
    x_ptr,
    kernel_ptr,
    mean_ptr,
    multiplier_ptr,
    bias_ptr,
    shift_ptr,
    slope_ptr,
    branch_scale_ptr,
    other_ptr,
    x_gradient_ptr,
    kernel_gradient_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    SCALED: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Write the gradient of x and, as partial sums [SLOTS, K, N] float32, that of the kernel.

    That of y is ``multiplier * g + slope * (y - mean) + shift`` and is never stored; g is the
    gradient times the activation's derivative at (y - mean) * multiplier + bias, with SCALED also
    times the branch scale of its image of PIXELS rows. With OTHER the gradient of x is added to
    another one.
    """
    LANES_K: tl.constexpr = triton.next_power_of_2(K)
    LANES_N: tl.constexpr = triton.next_power_of_2(N)
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    slot = tl.program_id(0)
    row = tl.arange(0, CONFIG.rows)
    k, n = tl.arange(0, LANES_K), tl.arange(0, LANES_N)
    mean = tl.load(mean_ptr + n, n < N, 0.0)[None, :]
    multiplier = tl.load(multiplier_ptr + n, n < N, 0.0)[None, :]
    bias = tl.load(bias_ptr + n, n < N, 0.0)[None, :]
    shift = tl.load(shift_ptr + n, n < N, 0.0)[None, :]
    slope = tl.load(slope_ptr + n, n < N, 0.0)[None, :]
    transposed = tl.load(
        kernel_ptr + k[None, :] * N + n[:, None], (n < N)[:, None] & (k < K)[None, :], 0.0
    )
    total = tl.zeros((LANES_K, LANES_N), tl.float32)
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        there = (first + row < ROWS)[:, None]
        start = tl.cast(first, tl.int64)
        n_offset = start * N + (row[:, None] * N + n[None, :])
        k_offset = start * K + (row[:, None] * K + k[None, :])
        n_mask, k_mask = there & (n < N)[None, :], there & (k < K)[None, :]
        g = tl.load(gradient_ptr + n_offset, n_mask, 0.0).to(tl.float32)
        centred = tl.load(y_ptr + n_offset, n_mask, 0.0).to(tl.float32) - mean
        x = tl.load(x_ptr + k_offset, k_mask, 0.0)
        g = times_slope(g, centred * multiplier + bias, ACTIVATION)
        if SCALED:
            image = (first + row) // PIXELS
            g *= tl.load(branch_scale_ptr + image, first + row < ROWS, 0.0)[:, None]
        # Of rows that are not there it is any number, but x is 0.
        y_gradient = (multiplier * g + (slope * centred + shift)).to(x.dtype)
        x_gradient = tl.dot(y_gradient, transposed)
        if OTHER:
            x_gradient += tl.load(other_ptr + k_offset, k_mask, 0.0).to(tl.float32)
        tl.store(x_gradient_ptr + k_offset, x_gradient.to(x.dtype), k_mask)
        total = tl.dot(tl.trans(x), y_gradient, total)
    place = kernel_gradient_ptr + slot.to(tl.int64) * (K * N) + k[:, None] * N + n[None, :]
    tl.store(place, total, (k < K)[:, None] & (n < N)[None, :])
