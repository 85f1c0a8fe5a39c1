"""The aggregation's GPU kernels behind 2^31 values, in Triton's interpreter.

Arrays are as large as on a GPU, but only the pages of their first and last images are ever
touched, and only the programs that work there are run.
"""

import numpy as np
import pytest
from helpers import triton_interpreter  # first, or nothing interprets; may skip all

from cotnet_jax.ops.local_aggregation.triton import cooperative_kernels, group_norm_kernels, launch
from cotnet_jax.ops.local_aggregation.triton.configs import (
    AggregationConfig,
    CooperativeConfig,
    NormalizationConfig,
)

pytestmark = pytest.mark.kernels
H, W, GROUPS, CHANNELS, SHARE, TAPS = 3, 2, 1, 4, 8, 9
WIDTH = GROUPS * CHANNELS * SHARE
# Images of the small batch and of the large one, in which more than 2^31 values lie before the
# last two.
FEW, MANY = 2, 2**31 // (H * W * WIDTH) + 3
# Two cooperative groups an image, of two programs each.
COOPERATIVE = CooperativeConfig(CHANNELS // 2, 2, 4, 1, False, resident=1)


@pytest.fixture
def ends(monkeypatch):
    """Make kernels run their first and last programs alone, with small configurations."""

    def call(kernel, programs, num_warps, operands, outputs, zeroed_outputs=(), **constants):
        del num_warps, zeroed_outputs
        some = min(4 if "cooperative" in kernel.fn.__name__ else 2, programs)
        numbers = sorted({*range(some), *range(programs - some, programs)})
        results = [np.zeros(a.shape, a.dtype) for a in outputs]
        triton_interpreter.run_some(kernel, programs, numbers, [*operands, *results], constants)
        return results

    monkeypatch.setattr(launch, "call_kernel", call)
    for name, config in (
        ("aggregation_config", AggregationConfig(1, 2, 32, 1, False, reload=False)),
        ("normalization_config", NormalizationConfig(256, 4, 2)),
    ):
        monkeypatch.setattr(launch, name, lambda *_, config=config: config)


def batch(images, *shape, dtype=np.float16, seed=0):
    """So many images of zeros, but for the last two."""
    array = np.zeros((images, *shape), dtype)
    array[-2:] = np.random.default_rng(seed).standard_normal((2, *shape))
    return array


def operands(images):
    values = batch(images, H, W, WIDTH)
    weights = batch(images, H, W, GROUPS, TAPS, CHANNELS, seed=1)
    gradient = batch(images, H, W, WIDTH, seed=2)
    mean, rstd = (
        batch(images, GROUPS, 1, CHANNELS, dtype=np.float32, seed=3 + i) for i in range(2)
    )
    random = np.random.default_rng(5)
    scale, bias = random.standard_normal((2, GROUPS, TAPS, CHANNELS), np.float32)
    output = random.standard_normal((2, WIDTH), np.float32)
    return values, weights, gradient, mean, rstd, scale, bias, *output


def plain(values, weights, gradient, *_):
    y = launch._forward("forward", values, weights)
    dx, dw, _ = launch._backward("backward", values, weights, gradient)
    return y, dx, dw


def two_steps(values, weights, gradient, mean, rstd, scale, bias, *output):
    statistics = launch.statistics(weights, 1e-5)
    normalization = (mean, rstd, scale, bias)
    y = launch.aggregate_normalized(values, weights, *normalization)
    activated = launch.aggregate_normalized(values, weights, *normalization, *output)
    dx, dw, sums = launch.aggregation_backward(values, weights, gradient, *normalization)
    images = weights.shape[0]
    raw_dw, _ = launch._normalize(
        group_norm_kernels.group_norm_backward,
        launch.normalization_config("group_norm_backward", weights),
        images,
        (weights, dw, mean, rstd, scale, sums),
        [weights, np.empty((2, images, GROUPS, TAPS, CHANNELS), np.float32)],
        N=images,
        IMAGES=1,
        PIECES=1,
        LINES=sums.shape[2],
    )
    return *statistics, y, activated, dx, dw, sums[1], raw_dw


def cooperative(values, weights, gradient, mean, rstd, scale, bias, *output):
    images = weights.shape[0]
    inputs, options = (values, weights, scale, bias), {"epsilon": 1e-5, "config": COOPERATIVE}
    forward = launch.cooperative_forward(*inputs, **options)
    activated, *_ = launch.cooperative_forward(*inputs, *output, **options)
    parameters = np.empty((2, images * 2 * W, GROUPS, TAPS, CHANNELS), np.float32)
    dx, dw, _ = launch._cooperate(
        cooperative_kernels.cooperative_backward,
        COOPERATIVE,
        images,
        (values, weights, gradient, mean, rstd, scale, bias),
        [values, weights, parameters],
        N=images,
        GROUPS=images,
    )
    return *forward, activated, dx, dw


@pytest.mark.parametrize("kernels", [plain, two_steps, cooperative])
def test_last_images_are_those_of_a_small_batch(kernels, ends):
    got, expected = (kernels(*operands(images)) for images in (MANY, FEW))
    for index, (large, small) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(small[-1]).max() > 0
        np.testing.assert_array_equal(large[-1], small[-1], err_msg=f"result {index}")
