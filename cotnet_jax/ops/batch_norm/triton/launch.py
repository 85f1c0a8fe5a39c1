"""The kernels of ``sums_kernels`` and ``product_kernels``, called through jax-triton.

The functions here take and return what their XLA forms in ``plain`` and ``convolution`` do, sums in
float32. They work under jit and shard_map; under vmap the calls run in turn. Importing this module
needs triton, jax-triton and JAX with CUDA.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.custom_batching import sequential_vmap

from cotnet_jax.ops.batch_norm.triton import product_kernels, sums_kernels
from cotnet_jax.ops.triton_call import call_kernel, most_stages

# Channels and values of a block that a program reads at once, warps of a program, and programs of
# a grid, some for each multiprocessor of a GPU: each leaves its own partial sums. The fastest, or
# within 3 % of it, of those measured on an H100 at the sizes of cotnet50.
BLOCK_CHANNELS = 64
BLOCK = 8192
NUM_WARPS = 4
PROGRAMS = 264


class ProductConfig(NamedTuple):
    """How a kernel of ``product_kernels`` is laid out.

    Attributes:
      rows: of a block.
      columns: of an input, that a program of ``backward`` has.
      num_warps: of a program.
      num_stages: blocks that are on their way at once.
      programs: of a grid.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int


# The fastest, or within 2 % of it, of those measured on an H100 at cotnet50's 1x1 convolutions.
PRODUCT = ProductConfig(rows=64, columns=64, num_warps=4, num_stages=3, programs=PROGRAMS)


@sequential_vmap
def channel_sums(x):
    """As ``plain.channel_sums``."""
    (sums,) = _call(sums_kernels.channel_sums, (x,), [])
    return sums


def backward_sums(gradient, x, mean, multiplier, bias, *, activation):
    """As ``plain.backward_sums``."""

    @sequential_vmap
    def call(gradient, x, mean, multiplier, bias):
        vectors = (a.astype(jnp.float32) for a in (mean, multiplier, bias))
        (sums,) = _call(
            sums_kernels.backward_sums, (gradient, x, *vectors), [], ACTIVATION=activation or "none"
        )
        return sums

    return call(gradient, x, mean, multiplier, bias)


@sequential_vmap
def residual_backward_sums(gradient, x, output, mean, branch_scale=None):
    """As ``plain.residual_backward_sums``."""
    pixels = math.prod(x.shape[1:-1])
    scaled = branch_scale is not None
    vectors = (mean.astype(jnp.float32), branch_scale.astype(jnp.float32) if scaled else mean)
    sums, masked = _call(
        sums_kernels.residual_backward_sums,
        (gradient, x, output, *vectors),
        [gradient],
        PIXELS=pixels,
        SCALED=scaled,
    )
    return sums, masked


@sequential_vmap
def product(x, kernel, more=None):
    """As ``convolution.xla_product``."""
    channels = kernel.shape[1]
    slots = PRODUCT.programs
    outputs = [
        jax.ShapeDtypeStruct((*x.shape[:-1], channels), x.dtype),
        jax.ShapeDtypeStruct((slots, 2, channels), jnp.float32),
    ]
    y, sums = _call_product(
        *(product_kernels.forward, slots, slots, x, kernel),
        (x, x if more is None else more, kernel),
        outputs,
    )
    return y, sums.sum(0)


def product_backward(
    gradient,
    y,
    x,
    kernel,
    mean,
    multiplier,
    bias,
    shift,
    slope,
    *optional,
    activation,
    added,
    more,
):
    """As ``convolution.xla_product_backward``."""

    @sequential_vmap
    def call(gradient, y, x, kernel, *rest):
        vectors, optional = rest[:5], list(rest[5:])
        # The kernel takes all its pointers; those that its options leave out are not read.
        other = optional.pop(0) if added else x
        more_x = optional.pop(0) if more else x
        inputs = (x, more_x) if more else (x,)
        blocks = sum(math.ceil(a.shape[-1] / PRODUCT.columns) for a in inputs)
        slots = max(1, PRODUCT.programs // blocks)
        vectors = (vector.astype(jnp.float32) for vector in vectors)
        nothing = jax.ShapeDtypeStruct((1,), x.dtype)
        kernel_parts = jax.ShapeDtypeStruct((slots, *kernel.shape), jnp.float32)
        x_gradient, more_gradient, kernel_gradient = _call_product(
            *(product_kernels.backward, slots * blocks, slots, x, kernel),
            (gradient, y, x, more_x, kernel, *vectors, other),
            [x, more_x if more else nothing, kernel_parts],
            ACTIVATION=activation or "none",
            OTHER=added,
        )
        gradients = (x_gradient, kernel_gradient.sum(0))
        return (*gradients, more_gradient) if more else gradients

    return call(gradient, y, x, kernel, mean, multiplier, bias, shift, slope, *optional)


def _call_product(kernel, programs, slots, x, weights, operands, outputs, **constants):
    return call_kernel(
        kernel,
        programs,
        PRODUCT.num_warps,
        operands,
        outputs,
        name=f"batch_norm_product_{kernel.fn.__name__}",
        ROWS=x.size // x.shape[-1],
        K=x.shape[-1],
        MORE=weights.shape[0] - x.shape[-1],
        N=weights.shape[1],
        SLOTS=slots,
        CONFIG=PRODUCT._replace(num_stages=min(PRODUCT.num_stages, most_stages())),
        **constants,
    )


def _call(kernel, operands, outputs, **constants):
    x = operands[0]
    channels = x.shape[-1]
    rows = x.size // channels
    block_channels = min(triton.next_power_of_2(channels), BLOCK_CHANNELS)
    block_rows = BLOCK // block_channels
    blocks = math.ceil(channels / block_channels)
    slots = max(1, min(PROGRAMS // blocks, math.ceil(rows / block_rows)))
    partial, *results = call_kernel(
        kernel,
        slots * blocks,
        NUM_WARPS,
        operands,
        [jax.ShapeDtypeStruct((slots, 2, channels), jnp.float32), *outputs],
        name=f"batch_norm_{kernel.fn.__name__}",
        ROWS=rows,
        C=channels,
        SLOTS=slots,
        BLOCK_ROWS=block_rows,
        BLOCK_C=block_channels,
        **constants,
    )
    return partial.sum(0), *results
