"""Triton kernels of a 1x1 convolution together with the batch normalisation after it.

Rows are the pixels of a batch, ROWS of them, with K channels in and N out; where MORE is not 0, so
many channels of a second input follow the K. A program has every SLOTS-th block of the rows,
forward with all of their channels, and its part of the small kernel [K + MORE, N] stays in fast
memory: forward everything is read once, backward y and its gradient once for each block of the
inputs' channels. Products are of the arrays' dtype, sums of float32.
"""

import triton
import triton.language as tl

from cotnet_jax.ops.batch_norm.triton.sums_kernels import times_slope


@triton.jit
def forward(
    x_ptr,
    more_ptr,
    kernel_ptr,
    y_ptr,
    sums_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    MORE: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """Write y = x @ kernel, and partial sums of y and of its squares, [SLOTS, 2, N] float32."""
    LANES: tl.constexpr = triton.next_power_of_2(K)
    COLUMNS: tl.constexpr = triton.next_power_of_2(N)
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    slot = tl.program_id(0)
    row, k, n = tl.arange(0, CONFIG.rows), tl.arange(0, LANES), tl.arange(0, COLUMNS)
    kernel = tl.load(
        kernel_ptr + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], 0.0
    )
    if MORE:
        more_k = tl.arange(0, triton.next_power_of_2(MORE))
        more_kernel = tl.load(
            kernel_ptr + K * N + more_k[:, None] * N + n[None, :],
            (more_k < MORE)[:, None] & (n < N)[None, :],
            0.0,
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
        y = tl.dot(x, kernel)
        if MORE:
            more = tl.load(
                more_ptr + start * MORE + (row[:, None] * MORE + more_k[None, :]),
                there[:, None] & (more_k < MORE)[None, :],
                0.0,
            )
            y = tl.dot(more, more_kernel, y)
        y = y.to(x.dtype)
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
    more_ptr,
    kernel_ptr,
    mean_ptr,
    multiplier_ptr,
    bias_ptr,
    shift_ptr,
    slope_ptr,
    other_ptr,
    x_gradient_ptr,
    more_gradient_ptr,
    kernel_gradient_ptr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    MORE: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Write the gradients of the inputs, and as partial sums that of the kernel.

    Those are [SLOTS, K + MORE, N], float32. The gradient of y is
    ``multiplier * g + slope * (y - mean) + shift`` and is never stored; g is the gradient times the
    activation's derivative at (y - mean) * multiplier + bias. With OTHER the gradient of x is added
    to another one. A program has CONFIG.columns channels of one of the inputs, and all of y.
    """
    LANES: tl.constexpr = triton.next_power_of_2(N)
    COLUMNS: tl.constexpr = CONFIG.columns
    X_BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = X_BLOCKS + (MORE + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    slot, block = program // BLOCKS, program % BLOCKS
    n = tl.arange(0, LANES)
    vectors = (
        tl.load(mean_ptr + n, n < N, 0.0)[None, :],
        tl.load(multiplier_ptr + n, n < N, 0.0)[None, :],
        tl.load(bias_ptr + n, n < N, 0.0)[None, :],
        tl.load(shift_ptr + n, n < N, 0.0)[None, :],
        tl.load(slope_ptr + n, n < N, 0.0)[None, :],
    )
    parts_ptr = kernel_gradient_ptr + slot.to(tl.int64) * ((K + MORE) * N)
    if block < X_BLOCKS:
        _input_backward(
            gradient_ptr,
            y_ptr,
            x_ptr,
            kernel_ptr,
            vectors,
            other_ptr,
            x_gradient_ptr,
            parts_ptr,
            slot,
            block * COLUMNS + tl.arange(0, COLUMNS),
            ROWS,
            K,
            N,
            SLOTS,
            CONFIG,
            ACTIVATION,
            OTHER,
        )
    else:
        _input_backward(
            gradient_ptr,
            y_ptr,
            more_ptr,
            kernel_ptr + K * N,
            vectors,
            other_ptr,
            more_gradient_ptr,
            parts_ptr + K * N,
            slot,
            (block - X_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS),
            ROWS,
            MORE,
            N,
            SLOTS,
            CONFIG,
            ACTIVATION,
            False,
        )


@triton.jit
def _input_backward(
    gradient_ptr,
    y_ptr,
    x_ptr,
    kernel_ptr,
    vectors,
    other_ptr,
    x_gradient_ptr,
    kernel_gradient_ptr,
    slot,
    k,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    CONFIG: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Write the gradients of the channels k of an input, and of their rows of the kernel."""
    COLUMNS: tl.constexpr = CONFIG.columns
    LANES: tl.constexpr = triton.next_power_of_2(N)
    STEP: tl.constexpr = SLOTS * CONFIG.rows
    row, n = tl.arange(0, CONFIG.rows), tl.arange(0, LANES)
    mean, multiplier, bias, shift, slope = vectors
    transposed = tl.load(
        kernel_ptr + k[None, :] * N + n[:, None], (n < N)[:, None] & (k < K)[None, :], 0.0
    )
    total = tl.zeros((COLUMNS, LANES), tl.float32)
    for first in tl.range(slot * CONFIG.rows, ROWS, STEP, num_stages=CONFIG.num_stages):
        there = (first + row < ROWS)[:, None]
        start = tl.cast(first, tl.int64)
        n_offset = row[:, None] * N + n[None, :]
        k_offset = row[:, None] * K + k[None, :]
        n_mask, k_mask = there & (n < N)[None, :], there & (k < K)[None, :]
        g = tl.load(gradient_ptr + start * N + n_offset, n_mask, 0.0).to(tl.float32)
        centred = tl.load(y_ptr + start * N + n_offset, n_mask, 0.0).to(tl.float32) - mean
        x = tl.load(x_ptr + start * K + k_offset, k_mask, 0.0)
        g = times_slope(g, centred * multiplier + bias, ACTIVATION)
        # Of rows that are not there it is any number, but x is 0.
        y_gradient = (multiplier * g + (slope * centred + shift)).to(x.dtype)
        x_gradient = tl.dot(y_gradient, transposed)
        if OTHER:
            other = tl.load(other_ptr + start * K + k_offset, k_mask, 0.0)
            x_gradient += other.to(tl.float32)
        tl.store(x_gradient_ptr + start * K + k_offset, x_gradient.to(x.dtype), k_mask)
        total = tl.dot(tl.trans(x), y_gradient, total)
    place = kernel_gradient_ptr + k[:, None] * N + n[None, :]
    tl.store(place, total, (k < K)[:, None] & (n < N)[None, :])
