"""Pooling of 3x3 windows at every second pixel, with gradients in one pass over memory.

XLA's own gradients, a scatter to the selected pixels and a window sum over a diluted array, read
and wrote up to ten times as many bytes as there are (measured on an H100). Here every pixel
gathers from the at most four windows that it lies in. On CPUs that gradient is faster too, but not
the sum or maximum of shifted images, which on GPUs is. On NVIDIA GPUs kernels do both.

Windows are centred on even rows and columns, as with a padding of one pixel:
[N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C].
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cotnet_jax.ops.dispatch import check_implementation, dispatch

_LAUNCH = "cotnet_jax.ops.pooling.triton.launch"
# Row and column of a window's pixels, in the order in which equal maxima are chosen.
_PIXELS = tuple(itertools.product(range(3), range(3)))
_WINDOW = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}


def max_pool(
    x: Float[Array, "N H W C"], implementation: str | None = None
) -> Float[Array, "N -(-H//2) -(-W//2) C"]:
    """Return the maxima; pixels outside the image never win, and the first of equal ones does.

    ``implementation`` is as in ``local_aggregation``, and so are the errors.
    """
    check_implementation("max_pool", implementation, x)
    return _max_pool(x.shape[1:3], implementation, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pool(size, implementation, x):
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(nn.max_pool, **_WINDOW),
        default=lambda x: _max_pool_forward(size, implementation, x)[0],
    )


def _max_pool_forward(size, implementation, x):
    del size
    return dispatch(_LAUNCH, implementation, "max_pool", xla_max_pool, x)


def _max_pool_backward(size, implementation, position, gradient):
    operands = (gradient, position)
    backward = (_LAUNCH, implementation, "max_pool_backward", xla_max_pool_backward)
    return (dispatch(*backward, *operands, size=size),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def average_pool(
    x: Float[Array, "N H W C"], implementation: str | None = None
) -> Float[Array, "N -(-H//2) -(-W//2) C"]:
    """Return the means, in which pixels outside the image count as zeros.

    ``implementation`` is as in ``local_aggregation``, and so are the errors.
    """
    check_implementation("average_pool", implementation, x)
    return _average_pool(x.shape[1:3], implementation, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _average_pool(size, implementation, x):
    del size
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(nn.avg_pool, **_WINDOW),
        default=functools.partial(
            dispatch, _LAUNCH, implementation, "average_pool", xla_average_pool
        ),
    )


def _average_pool_forward(size, implementation, x):
    return _average_pool(size, implementation, x), None


def _average_pool_backward(size, implementation, residuals, gradient):
    del residuals
    backward = (_LAUNCH, implementation, "average_pool_backward", xla_average_pool_backward)
    return (dispatch(*backward, gradient, size=size),)


_average_pool.defvjp(_average_pool_forward, _average_pool_backward)


def xla_max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maxima, and which of ``_PIXELS`` they are, as uint8."""
    windows = _windows(x, -jnp.inf)
    y, position = windows[0], jnp.zeros(windows[0].shape, jnp.uint8)
    for index, pixel in enumerate(windows[1:], start=1):
        # NaN wins, and stays.
        better = (pixel > y) | jnp.isnan(pixel)
        y, position = jnp.where(better, pixel, y), jnp.where(better, jnp.uint8(index), position)
    return y, position


def xla_average_pool(x: jax.Array) -> jax.Array:
    """Return the means."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (functools.reduce(jnp.add, _windows(wide, 0)) / len(_PIXELS)).astype(x.dtype)


def xla_max_pool_backward(
    gradient: jax.Array, position: jax.Array, *, size: tuple[int, int]
) -> jax.Array:
    """Return the gradient of an image of H and W pixels."""

    def share(pixel, window):
        gradient, position = window
        return jnp.where(position == pixel, gradient, 0)

    return _gather(share, (gradient, position), size, gradient.dtype)


def xla_average_pool_backward(gradient: jax.Array, *, size: tuple[int, int]) -> jax.Array:
    """Return the gradient of an image of H and W pixels."""
    mean = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)) / len(_PIXELS)
    return _gather(lambda pixel, window: window[0], (mean,), size, gradient.dtype)


def _windows(x, outside):
    """Return, for each of ``_PIXELS``, that pixel of all windows."""
    rows, columns = (-(-size // 2) for size in x.shape[1:3])
    # Of an odd length the last window is centred on the last pixel.
    margins = [(1, size % 2) for size in x.shape[1:3]]
    x = jnp.pad(x, [(0, 0), *margins, (0, 0)], constant_values=outside)
    return [
        x[:, row : row + 2 * rows - 1 : 2, column : column + 2 * columns - 1 : 2]
        for row, column in _PIXELS
    ]


def _gather(share, windows, size, dtype):
    """Return for each pixel of the image the sum of what the windows give it, in ``dtype``.

    Window (r, c) has rows 2r - 1, 2r and 2r + 1, so that an even row is in the middle of one
    window, an odd row the last of that and the first of the next.

    Args:
      share: (index in ``_PIXELS``, arrays of the windows) -> what the pixel there gets of them.
      windows: arrays [N, ceil(H / 2), ceil(W / 2), C].
      size: H and W.
    """
    height, width = size
    odd_row = jnp.arange(height)[:, None, None] % 2
    odd_column = jnp.arange(width)[:, None] % 2
    total = jnp.zeros((), jnp.promote_types(dtype, jnp.float32))
    for next_row, next_column in itertools.product((0, 1), repeat=2):
        row = jnp.where(next_row == 0, 1 + odd_row, 0)
        column = jnp.where(next_column == 0, 1 + odd_column, 0)
        theirs = [_at_each_pixel(a, next_row, next_column, size) for a in windows]
        inside = (odd_row >= next_row) & (odd_column >= next_column)
        total += jnp.where(inside, share(3 * row + column, theirs), 0)
    # Without the barrier XLA keeps the sum in float32, or takes it again for each use.
    return jax.lax.optimization_barrier(total.astype(dtype))


def _at_each_pixel(array, next_row, next_column, size):
    """Return, for each pixel of the image, what its window has, or the next one; zeros outside."""
    array = jnp.pad(
        array[:, next_row:, next_column:], [(0, 0), (0, next_row), (0, next_column), (0, 0)]
    )
    return array.repeat(2, 1).repeat(2, 2)[:, : size[0], : size[1]]
