"""The aggregation's GPU kernels behind 2^31 values, in Triton's interpreter.

Arrays are as large as on a GPU, but only the pages of their first and last pictures are ever
touched, and only the programs that work there are run.
"""

import numpy as np
import pytest
from helpers import triton_interpreter  # first, or nothing interprets; may skip all

from cotnet_jax.ops.local_aggregation.triton import (
    aggregation_kernels,
    cooperative_kernels,
    group_norm_kernels,
    launch,
)
from cotnet_jax.ops.local_aggregation.triton.configs import NormTile, TeamTile, Tile

H, W, GROUPS, CHANNELS, SHARE, TAPS = 3, 2, 1, 4, 8, 9
WIDTH = GROUPS * CHANNELS * SHARE
# Pictures of the small batch and of the large one, in which more than 2^31 values lie before the
# last two.
FEW, MANY = 2, 2**31 // (H * W * WIDTH) + 3
# Two teams a picture, of two programs each.
TEAM = TeamTile(CHANNELS // 2, 2, 4, 1, False, resident=1)


@pytest.fixture
def ends(monkeypatch):
    """Makes kernels run their first and last programs alone, in small tiles."""

    def call(kernel, programs, warps, operands, outputs, zeroed_outputs=(), **constants):
        del warps, zeroed_outputs
        some = min(4 if "team" in kernel.fn.__name__ else 2, programs)
        numbers = sorted({*range(some), *range(programs - some, programs)})
        results = [np.zeros(a.shape, a.dtype) for a in outputs]
        triton_interpreter.run_some(kernel, programs, numbers, [*operands, *results], constants)
        return results

    def norm_tile(kernel, weights):
        del kernel, weights
        return NormTile(256, 4, 2)

    def tile(kernel, values, weights):
        del kernel, values, weights
        return Tile(1, 2, 32, 1, False, reload=False)

    monkeypatch.setattr(launch, "call_kernel", call)
    monkeypatch.setattr(launch, "aggregation_tile", tile)
    monkeypatch.setattr(launch, "norm_tile", norm_tile)


def batch(pictures, *shape, dtype=np.float16, seed=0):
    """So many pictures of zeros, but for the last two."""
    array = np.zeros((pictures, *shape), dtype)
    array[-2:] = np.random.default_rng(seed).standard_normal((2, *shape))
    return array


def operands(pictures):
    values = batch(pictures, H, W, WIDTH)
    weights = batch(pictures, H, W, GROUPS, TAPS, CHANNELS, seed=1)
    gradient = batch(pictures, H, W, WIDTH, seed=2)
    mean, factor = (
        batch(pictures, GROUPS, 1, CHANNELS, dtype=np.float32, seed=3 + i) for i in range(2)
    )
    random = np.random.default_rng(5)
    scale, bias = random.standard_normal((2, GROUPS, TAPS, CHANNELS), np.float32)
    output = random.standard_normal((2, WIDTH), np.float32)
    return values, weights, gradient, mean, factor, scale, bias, *output


def plain(values, weights, gradient, *_):
    call = launch._aggregate
    (y,) = call(aggregation_kernels.forward, values, weights, (values, weights), [values])
    outputs = [values, weights]
    kernel = aggregation_kernels.backward
    return y, *call(kernel, values, weights, (values, weights, gradient), outputs)


def two_steps(values, weights, gradient, mean, factor, scale, bias, *output):
    triton = launch
    statistics = triton.statistics(weights, 1e-5)
    inputs = (values, weights, mean, factor, scale, bias)
    y = triton.aggregate_normalized(*inputs)
    kernel = aggregation_kernels.activated_forward
    (activated,) = triton._aggregate(kernel, values, weights, (*inputs, *output), [values])
    dx, dw, sums = triton.aggregation_backward(gradient, *inputs)
    raw_dw, *_ = triton._normalize(
        group_norm_kernels.group_norm_backward,
        weights.shape[0],
        weights,
        (weights, dw, mean, factor, scale, sums),
        [weights, np.empty((2, weights.shape[0], GROUPS, TAPS, CHANNELS), np.float32)],
        N=weights.shape[0],
        PICTURES=1,
        PIECES=1,
        LINES=sums.shape[2],
    )
    return *statistics, y, activated, dx, dw, sums[1], raw_dw


def by_teams(values, weights, gradient, mean, factor, scale, bias, *output):
    triton, kernel = launch, cooperative_kernels.team_activated_forward
    pictures = weights.shape[0]
    inputs = (values, weights, scale, bias)
    forward = triton.team_forward(*inputs, 1e-5, TEAM)
    (activated,) = triton._by_teams(
        *(kernel, TEAM, pictures, values, weights, (*inputs, *output), [values]), EPSILON=1e-5
    )
    parameters = np.empty((2, pictures * 2 * W, GROUPS, TAPS, CHANNELS), np.float32)
    dx, dw, _ = triton._by_teams(
        *(cooperative_kernels.team_backward, TEAM, pictures, values, weights),
        (values, weights, gradient, mean, factor, scale, bias),
        [values, weights, parameters],
        N=pictures,
        TEAMS=pictures,
    )
    return *forward, activated, dx, dw


@pytest.mark.parametrize("kernels", [plain, two_steps, by_teams])
def test_last_pictures_are_those_of_a_small_batch(kernels, ends):
    got, expected = (kernels(*operands(pictures)) for pictures in (MANY, FEW))
    for index, (large, small) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(small[-1]).max() > 0
        np.testing.assert_array_equal(large[-1], small[-1], err_msg=f"result {index}")
