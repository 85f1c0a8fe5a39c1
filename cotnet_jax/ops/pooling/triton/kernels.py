"""Triton kernels of 3x3 windows at every second pixel; importable only where triton is.

An image [HEIGHT, WIDTH, C] has ROWS x COLUMNS windows, centred on its even rows and columns. A
program has BLOCK pixels of the result, of PIXELS in the whole batch, and BLOCK_C channels of them.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    x_ptr,
    y_ptr,
    position_ptr,
    PIXELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """Write the windows' means, or with MAXIMUM their maxima and where in the window they are."""
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    pixel, channel, offset, mask = _block(PIXELS, C, BLOCK, BLOCK_C)
    image = (pixel // (ROWS * COLUMNS)).to(tl.int64)
    row, column = pixel // COLUMNS % ROWS * 2 - 1, pixel % COLUMNS * 2 - 1
    first = x_ptr + (image * HEIGHT + row) * (WIDTH * C) + column * C
    if MAXIMUM:
        y = tl.full((BLOCK, BLOCK_C), float("-inf"), tl.float32)
        position = tl.zeros((BLOCK, BLOCK_C), tl.int32)
    else:
        y = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for index in tl.static_range(9):
        inside = (row + index // 3 >= 0) & (row + index // 3 < HEIGHT)
        inside &= (column + index % 3 >= 0) & (column + index % 3 < WIDTH)
        place = (first + (index // 3 * WIDTH + index % 3) * C)[:, None] + channel[None, :]
        outside = float("-inf") if MAXIMUM else 0.0
        value = tl.load(place, mask & inside[:, None], outside).to(tl.float32)
        if MAXIMUM:
            # NaN wins, and stays. The middle is always inside.
            better = (value > y) | (value != value)
            y = tl.where(better, value, y)
            position = tl.where(better, index, position)
        else:
            y += value
    if MAXIMUM:
        tl.store(position_ptr + offset, position.to(tl.uint8), mask)
    else:
        y = y / 9
    tl.store(y_ptr + offset, y.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def backward(
    gradient_ptr,
    position_ptr,
    x_gradient_ptr,
    PIXELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """Write for each pixel the sum of what the at most four windows that it lies in give it."""
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    pixel, channel, offset, mask = _block(PIXELS, C, BLOCK, BLOCK_C)
    image = (pixel // (HEIGHT * WIDTH)).to(tl.int64)
    row, column = pixel // WIDTH % HEIGHT, pixel % WIDTH
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for index in tl.static_range(4):
        # An odd row is the last one of a window and the first one of the next.
        window_row, window_column = row // 2 + index // 2, column // 2 + index % 2
        inside = (row % 2 >= index // 2) & (window_row < ROWS)
        inside &= (column % 2 >= index % 2) & (window_column < COLUMNS)
        window = (image * ROWS + window_row) * COLUMNS + window_column
        place = (window * C)[:, None] + channel[None, :]
        theirs = mask & inside[:, None]
        share = tl.load(gradient_ptr + place, theirs, 0.0).to(tl.float32)
        if MAXIMUM:
            at = (row - 2 * window_row + 1) * 3 + column - 2 * window_column + 1
            position = tl.load(position_ptr + place, theirs, 0).to(tl.int32)
            share = tl.where(position == at[:, None], share, 0.0)
        else:
            share = share / 9
        total += share
    tl.store(x_gradient_ptr + offset, total.to(gradient_ptr.dtype.element_ty), mask)


@triton.jit
def _block(PIXELS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's pixels and channels, their offsets, 64 bits wide, and the mask."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    pixel = program // BLOCKS * BLOCK + tl.arange(0, BLOCK)
    channel = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (pixel.to(tl.int64) * C)[:, None] + channel[None, :]
    return pixel, channel, offset, (pixel < PIXELS)[:, None] & (channel < C)[None, :]
