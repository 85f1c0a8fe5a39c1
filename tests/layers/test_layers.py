"""Layers against their definitions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.layers import BatchNorm, Conv, CoTLayer, DropPath, WeightGroupNorm, pooling

RANDOM = np.random.default_rng(0)


def mean_of_windows(x, size, strides, low, high, count_padding):
    """Averages windows of size x size, which start low pixels outside the image."""
    padded = np.pad(x, [(0, 0), (low, high), (low, high), (0, 0)], constant_values=np.nan)
    result = []
    for top in range(0, padded.shape[1] - size + 1, strides):
        row = []
        for left in range(0, padded.shape[2] - size + 1, strides):
            window = padded[:, top : top + size, left : left + size]
            total = np.nansum(window, (1, 2))
            row.append(total / (size**2 if count_padding else (~np.isnan(window)).sum((1, 2))))
        result.append(row)
    return np.moveaxis(np.asarray(result), 2, 0)


@pytest.mark.parametrize("size", [1, 6, 7])
def test_average_pool_3x3_counts_its_padding(size):
    x = RANDOM.standard_normal((2, size, size, 3))
    expected = mean_of_windows(x, 3, 2, 1, 1, True)
    np.testing.assert_allclose(pooling.average_pool_3x3(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 6, 7])
def test_average_pool_2x2_leaves_out_its_padding(size):
    x = RANDOM.standard_normal((2, size, size, 3))
    expected = mean_of_windows(x, 2, 2, 0, size % 2, False)
    np.testing.assert_allclose(pooling.average_pool_2x2(jnp.asarray(x), 2), expected, atol=1e-6)


@pytest.mark.parametrize("size", [6, 7])
def test_blur_pool_is_a_mirrored_binomial_filter(size):
    x = RANDOM.standard_normal((1, size, size, 2))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = [
        [
            (padded[:, i : i + 3, j : j + 3] * kernel[..., None]).sum((1, 2))
            for j in range(0, size, 2)
        ]
        for i in range(0, size, 2)
    ]
    expected = np.moveaxis(np.asarray(expected), 2, 0)
    np.testing.assert_allclose(pooling.blur_pool(jnp.asarray(x), 2), expected, atol=1e-6)


def test_batch_norm_keeps_the_unbiased_variance():
    x = jnp.asarray(RANDOM.standard_normal((4, 3, 3, 5)) * 3 + 1, jnp.float32)
    norm = BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    assert not np.any(variables["batch_stats"]["mean"])
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(y, (0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, (0, 1, 2)), 1, atol=1e-4)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(x, (0, 1, 2)), rtol=1e-5)
    unbiased = np.var(x, (0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_batch_norm_of_one_value_is_a_clear_error():
    x = jnp.zeros((1, 1, 1, 5))
    norm = BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="has 1 value per channel in a training batch"):
        norm.init(jax.random.key(0), x)


def test_scale_and_shift_of_a_batch_norm_are_the_same_normalisation():
    x = jnp.asarray(RANDOM.standard_normal((2, 3, 3, 5)), jnp.float32)
    variables = BatchNorm().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + RANDOM.random(a.shape, np.float32), variables)
    multiplier, shift = BatchNorm().apply(variables, 5, method="scale_and_shift")
    np.testing.assert_allclose(
        x * multiplier + shift, BatchNorm().apply(variables, x), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="running statistics only"):
        norm = BatchNorm(use_running_average=False)
        norm.apply(variables, 5, method="scale_and_shift", mutable=["batch_stats"])


def test_frozen_batch_norm_trains_as_it_infers():
    x = jnp.asarray(RANDOM.standard_normal((2, 3, 3, 5)), jnp.float32)
    variables = BatchNorm().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + RANDOM.random(a.shape, np.float32), variables)
    frozen = BatchNorm(use_running_average=False, frozen=True)
    y, updates = frozen.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, BatchNorm().apply(variables, x))
    jax.tree.map(
        np.testing.assert_array_equal, updates["batch_stats"], dict(variables["batch_stats"])
    )
    # The input's gradient is the multiplier: none goes through the statistics.
    multiplier, _ = frozen.apply(variables, 5, method="scale_and_shift")
    gradient = jax.grad(lambda x: frozen.apply(variables, x).sum())(x)
    np.testing.assert_allclose(gradient, np.broadcast_to(multiplier, x.shape), rtol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_with_frozen_batch_norms_trains_as_it_infers(fused):
    x = jnp.asarray(RANDOM.standard_normal((2, 4, 4, 16)), jnp.float32)
    layer = CoTLayer(norm=functools.partial(BatchNorm, frozen=True), fused=fused)
    variables = layer.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + RANDOM.random(a.shape, np.float32) / 2, variables)

    def loss(params, train):
        y, updates = layer.apply(
            {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
        )
        return jnp.sum(y**2), updates["batch_stats"]

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (trained, statistics), gradients = both(variables["params"], True)
    (inferred, _), expected = both(variables["params"], False)
    np.testing.assert_allclose(trained, inferred, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, statistics, variables["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        gradients,
        expected,
    )


def test_weight_group_norm_is_a_group_norm_over_kernel_positions_and_pixels():
    weights = jnp.asarray(RANDOM.standard_normal((2, 4, 5, 2, 9, 3)), jnp.float32)
    size = 2 * 9 * 3
    scale, bias = (jnp.asarray(RANDOM.standard_normal(size), jnp.float32) for _ in range(2))
    ours = WeightGroupNorm().apply({"params": {"scale": scale, "bias": bias}}, weights)

    def positions_last(array):
        """GroupNorm's order of channels: those of a group, here kernel positions, are adjacent."""
        return jnp.swapaxes(array.reshape(*array.shape[:-1], 2, 9, 3), -1, -2).reshape(array.shape)

    flat = positions_last(weights.reshape(2, 4, 5, size))
    usual = {"scale": positions_last(scale), "bias": positions_last(bias)}
    expected = nn.GroupNorm(num_groups=6, epsilon=1e-5).apply({"params": usual}, flat)
    np.testing.assert_allclose(
        positions_last(ours.reshape(2, 4, 5, size)), expected, rtol=1e-4, atol=1e-5
    )


def test_drop_path_scales_the_samples_that_it_keeps():
    x = jnp.ones((1000, 2, 3))
    y = DropPath(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    each = np.asarray(y).reshape(1000, -1)
    assert np.all((each == 0).all(1) | np.isclose(each, 1 / 0.75).all(1))
    assert np.mean(each[:, 0] == 0) == pytest.approx(0.25, abs=0.05)
    np.testing.assert_array_equal(DropPath(0.25).apply({}, x), x)


@pytest.mark.parametrize(("kernel_size", "groups", "dilation"), [(3, 4, 1), (1, 2, 1), (3, 2, 2)])
def test_a_grouped_convolution_is_each_groups_own(kernel_size, groups, dilation):
    x = jnp.asarray(RANDOM.standard_normal((2, 6, 5, 8)), jnp.float32)
    conv = Conv(12, kernel_size, groups=groups, dilation=dilation)
    variables = conv.init(jax.random.key(0), x)

    def whole(variables, x):
        padding = dilation * (kernel_size // 2)
        return jax.lax.conv_general_dilated(
            x,
            variables["params"]["kernel"],
            (1, 1),
            [(padding, padding)] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    for function in (
        lambda apply: apply(variables, x),
        lambda apply: jax.grad(lambda *a: jnp.sum(apply(*a) ** 2), (0, 1))(variables, x),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            function(conv.apply),
            function(whole),
        )
