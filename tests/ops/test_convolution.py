"""Convolutions in the forms for CPUs and for other platforms, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.ops import convolution
from cotnet_jax.ops.space_to_depth import space_to_depth_conv

RANDOM = np.random.default_rng(0)


@pytest.fixture(params=["cpu", "cuda", "default"])
def platform(request, monkeypatch):
    """Have the form for one platform chosen."""

    def choose(*operands, **forms):
        return forms.get(request.param, forms["default"])(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def xla(x, kernel, strides=1, dilation=1, groups=1):
    padding = dilation * (kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        *(x, kernel, (strides, strides), [(padding, padding)] * 2),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("kernel_size", "channels", "options"),
    [
        (1, 8, {}),
        (1, 8, {"strides": 2}),
        (1, 8, {"groups": 2, "strides": 2}),
        (3, 8, {"groups": 4}),
        (3, 8, {"dilation": 2}),
        (3, 8, {"strides": 2, "groups": 2}),
        # Groups that GPUs join: 4 and 2 to one of 8 channels or more, 8 to 2 of 12, 3 to one of 6.
        (3, 24, {"groups": 4}),
        (3, 24, {"groups": 8}),
        (3, 6, {"groups": 3, "strides": 2}),
        (7, 3, {"strides": 2}),
    ],
)
def test_every_form_is_the_convolution(kernel_size, channels, options, platform):
    with jax.enable_x64(True):
        x = jnp.asarray(RANDOM.standard_normal((2, 9, 6, channels)))
        shape = (kernel_size, kernel_size, channels // options.get("groups", 1), 24)
        kernel = jnp.asarray(RANDOM.standard_normal(shape))
        got, expected = (
            jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a, **options) ** 3), (0, 1))(x, kernel)
            for f in (convolution.convolve, xla)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, expected)


@pytest.mark.parametrize("size", [(8, 7), (9, 12), (1, 2)])
@pytest.mark.parametrize(("kernel_size", "strides"), [(1, 2), (3, 2), (7, 2), (5, 3)])
def test_a_convolution_of_blocks_is_the_strided_one(kernel_size, strides, size):
    with jax.enable_x64(True):
        x = jnp.asarray(RANDOM.standard_normal((2, *size, 3)))
        kernel = jnp.asarray(RANDOM.standard_normal((kernel_size, kernel_size, 3, 4)))
        got = space_to_depth_conv(x, kernel, strides=strides)
        np.testing.assert_allclose(got, xla(x, kernel, strides), atol=1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "channels_of_group", "groups", "joined"),
    [
        (1, 48, 2, 2),
        (3, 16, 4, 1),
        (3, 12, 8, 2),
        (3, 2, 8, 4),
        (3, 3, 2, 2),
    ],
)
def test_groups_are_joined_until_they_fill_a_tile(kernel_size, channels_of_group, groups, joined):
    shape = (kernel_size, kernel_size, channels_of_group, groups)
    assert convolution._groups_to_join(np.zeros(shape), groups) == joined


def test_weights_that_are_not_finite_stay_in_their_group():
    kernel = jnp.ones((1, 1, 2, 4)).at[..., 0].set(jnp.nan)
    joined = np.asarray(convolution.join_groups(kernel, 2, 2))[0, 0]
    np.testing.assert_array_equal(np.isnan(joined[:, 0]), [True, True, False, False])
    np.testing.assert_array_equal(joined[:, 1], [1, 1, 0, 0])
    np.testing.assert_array_equal(joined[:, 3], [0, 0, 1, 1])
