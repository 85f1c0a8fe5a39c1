"""The kernels of ``covariance_kernels``, called through jax-triton.

The functions here take and return what their XLA forms in ``covariance`` do. They work under jit
and shard_map; under vmap the calls run in turn. Importing this module needs triton, jax-triton and
JAX with CUDA.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.custom_batching import sequential_vmap

from cotnet_jax.ops.batch_norm.triton import covariance_kernels
from cotnet_jax.ops.triton_call import call_kernel, most_stages

# Programs of a grid in which each leaves its own partial sums.
PROGRAMS = 264
# Rows or columns of a block, at most.
LARGEST = 128


class CovarianceConfig(NamedTuple):
    """How a kernel of ``covariance_kernels`` is laid out.

    Those here are the fastest, or within 3 % of it, of six to eight of each kind that were measured
    on an H100 at the sizes of cotnet50; what each must fit is the largest at 256 channels in.

    Attributes:
      rows, columns: of what a program computes at once.
      depth: channels that ``input_gradient`` multiplies at once.
      num_warps: of a program.
      num_stages: blocks that are on their way at once.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def moments_config(channels_in: int) -> CovarianceConfig:
    """Return the configuration of ``moments``."""
    return CovarianceConfig(LARGEST, _columns(channels_in), 0, 4, 3)


def affine_config(channels_in: int, channels: int) -> CovarianceConfig:
    """Return the configuration of ``affine``."""
    columns = _columns(channels, 64 if channels_in > 128 else 128)
    return CovarianceConfig(min(64, LARGEST), columns, 0, 4, 3)


def gradient_products_config(channels_in: int, channels: int) -> CovarianceConfig:
    """Return the configuration of ``gradient_products``."""
    columns = _columns(channels, 64 if channels_in > 128 else 128)
    num_warps, num_stages = (8, 2) if channels_in <= 64 < columns else (4, 3)
    return CovarianceConfig(min(64, LARGEST), columns, 0, num_warps, num_stages)


def input_gradient_config(channels_in: int) -> CovarianceConfig:
    """Return the configuration of ``input_gradient``."""
    return CovarianceConfig(LARGEST, _columns(channels_in), _columns(channels_in, 64), 8, 3)


def _columns(channels, most=128):
    return min(triton.next_power_of_2(channels), most, LARGEST)


@sequential_vmap
def moments(x):
    """As ``covariance.xla_moments``."""
    channels = x.shape[-1]
    config = moments_config(channels)
    blocks = math.ceil(channels / config.columns) ** 2
    slots = _slots(blocks)
    sums, products = _call(
        covariance_kernels.moments,
        *(config, slots * blocks, (x,)),
        [_partial(slots, channels), _partial(slots, channels, channels)],
        x,
        SLOTS=slots,
    )
    return sums.sum(0), products.sum(0)


def affine(x, kernel, shift, *optional, activation, has_residual, scaled):
    """As ``covariance.xla_affine``."""

    @sequential_vmap
    def call(x, kernel, shift, *optional):
        residual, branch_scale = _split(optional, (x, shift), has_residual, scaled)
        channels = kernel.shape[1]
        config = affine_config(x.shape[-1], channels)
        blocks = math.ceil(channels / config.columns)
        slots = _slots(blocks)
        (y,) = _call(
            covariance_kernels.affine,
            *(config, slots * blocks, (x, kernel, shift, residual, branch_scale)),
            [jax.ShapeDtypeStruct((*x.shape[:-1], channels), x.dtype)],
            x,
            N=channels,
            SLOTS=slots,
            PIXELS=_pixels(x),
            RELU=activation == "relu",
            RESIDUAL=has_residual,
            SCALED=scaled,
        )
        return y

    return call(x, kernel, shift, *optional)


def gradient_products(gradient, x, *optional, masked, scaled):
    """As ``covariance.xla_gradient_products``."""

    @sequential_vmap
    def call(gradient, x, *optional):
        output, branch_scale = _split(optional, (x, x), masked, scaled)
        channels_in, channels = x.shape[-1], gradient.shape[-1]
        config = gradient_products_config(channels_in, channels)
        blocks = math.ceil(channels / config.columns)
        slots = _slots(blocks)
        nothing = jax.ShapeDtypeStruct((1,), gradient.dtype)
        sums, products, g = _call(
            covariance_kernels.gradient_products,
            *(config, slots * blocks, (gradient, x, output, branch_scale)),
            [
                _partial(slots, channels),
                _partial(slots, channels_in, channels),
                gradient if masked else nothing,
            ],
            x,
            N=channels,
            SLOTS=slots,
            PIXELS=_pixels(x),
            RELU=masked,
            SCALED=scaled,
        )
        return sums.sum(0), products.sum(0), g if masked else gradient

    return call(gradient, x, *optional)


def input_gradient(g, x, kernel, square, shift, *optional, scaled, added):
    """As ``covariance.xla_input_gradient``."""

    @sequential_vmap
    def call(g, x, kernel, square, shift, *optional):
        branch_scale, other = _split(optional, (shift, x), scaled, added)
        channels_in = x.shape[-1]
        config = input_gradient_config(channels_in)
        programs = math.ceil(x.size // channels_in / config.rows)
        (y,) = _call(
            covariance_kernels.input_gradient,
            *(config, programs * math.ceil(channels_in / config.columns)),
            (g, x, kernel.T, square, shift, branch_scale, other),
            [x],
            x,
            N=g.shape[-1],
            PIXELS=_pixels(x),
            SCALED=scaled,
            OTHER=added,
        )
        return y

    return call(g, x, kernel, square, shift, *optional)


def _split(optional, placeholders, *present):
    """Return the optional operands, with a placeholder for each that is not there.

    A kernel takes all its pointers; those that its options leave out are not read.
    """
    given = iter(optional)
    return [
        next(given) if there else placeholder
        for there, placeholder in zip(present, placeholders, strict=True)
    ]


def _slots(blocks):
    return max(1, PROGRAMS // blocks)


def _partial(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _pixels(x):
    return math.prod(x.shape[1:-1])


def _call(kernel, config, programs, operands, outputs, x, **constants):
    channels = x.shape[-1]
    config = config._replace(num_stages=min(config.num_stages, most_stages()))
    return call_kernel(
        kernel,
        programs,
        config.num_warps,
        operands,
        outputs,
        name=f"batch_norm_{kernel.fn.__name__}",
        ROWS=x.size // channels,
        K=channels,
        CONFIG=config,
        **constants,
    )
