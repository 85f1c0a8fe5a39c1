"""The pooling kernels, called through jax-triton.

The functions here take and return what their XLA forms in ``windows`` do. They work under jit and
shard_map; under vmap the calls run in turn. Importing this module needs triton, jax-triton and JAX
with CUDA.
"""

import math

import jax
import jax.numpy as jnp
import triton
from jax.custom_batching import sequential_vmap

from cotnet_jax.ops.pooling.triton import kernels
from cotnet_jax.ops.triton_call import call_kernel

# Values of the result that a program has, and the most channels of a pixel.
BLOCK = 2048
BLOCK_CHANNELS = 128
NUM_WARPS = 4


@sequential_vmap
def max_pool(x):
    """As ``windows.xla_max_pool``."""
    y = _pooled(x)
    return _call(kernels.forward, (x,), [y, jax.ShapeDtypeStruct(y.shape, jnp.uint8)], x, y, True)


@sequential_vmap
def average_pool(x):
    """As ``windows.xla_average_pool``."""
    y = _pooled(x)
    nothing = jax.ShapeDtypeStruct((1,), jnp.uint8)
    return _call(kernels.forward, (x,), [y, nothing], x, y, False)[0]


def max_pool_backward(gradient, position, *, size):
    """As ``windows.xla_max_pool_backward``."""

    @sequential_vmap
    def call(gradient, position):
        x = _image(gradient, size)
        return _call(kernels.backward, (gradient, position), [x], x, x, True)[0]

    return call(gradient, position)


def average_pool_backward(gradient, *, size):
    """As ``windows.xla_average_pool_backward``."""

    @sequential_vmap
    def call(gradient):
        x = _image(gradient, size)
        # There is no position, and none is read.
        return _call(kernels.backward, (gradient, gradient), [x], x, x, False)[0]

    return call(gradient)


def _pooled(x):
    rows, columns = (-(-size // 2) for size in x.shape[1:3])
    return jax.ShapeDtypeStruct((x.shape[0], rows, columns, x.shape[3]), x.dtype)


def _image(gradient, size):
    return jax.ShapeDtypeStruct((gradient.shape[0], *size, gradient.shape[3]), gradient.dtype)


def _call(kernel, operands, outputs, image, result, maximum):
    _, height, width, channels = image.shape
    pixels = math.prod(result.shape[:3])
    block_channels = min(triton.next_power_of_2(channels), BLOCK_CHANNELS)
    block = max(BLOCK // block_channels, 1)
    return call_kernel(
        kernel,
        math.ceil(pixels / block) * math.ceil(channels / block_channels),
        NUM_WARPS,
        operands,
        outputs,
        name=f"pooling_{kernel.fn.__name__}",
        PIXELS=pixels,
        HEIGHT=height,
        WIDTH=width,
        C=channels,
        BLOCK=block,
        BLOCK_C=block_channels,
        MAXIMUM=maximum,
    )
