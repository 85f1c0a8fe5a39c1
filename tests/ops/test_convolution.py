"""Convolutions in the forms for CPUs and for other platforms, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.ops import convolution
from cotnet_jax.ops.space_to_depth import space_to_depth_conv

RANDOM = np.random.default_rng(0)


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """Have the form for one platform chosen."""

    def choose(*operands, **forms):
        return forms[request.param](*operands)

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
        (7, 3, {"strides": 2}),
    ],
)
def test_every_form_is_the_convolution(kernel_size, channels, options, platform):
    with jax.enable_x64(True):
        x = jnp.asarray(RANDOM.standard_normal((2, 9, 6, channels)))
        shape = (kernel_size, kernel_size, channels // options.get("groups", 1), 12)
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
