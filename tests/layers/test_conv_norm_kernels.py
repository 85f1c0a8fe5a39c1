"""Which kernels a convolution and its batch normalisation run, in Triton's interpreter."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)

from cotnet_jax.layers import BatchNorm, Conv
from cotnet_jax.layers.conv_norm import conv_norm
from cotnet_jax.ops.batch_norm.triton import covariance_launch, launch

pytestmark = pytest.mark.kernels
COVARIANCE = {"moments", "affine", "gradient_products", "input_gradient"}
PRODUCT = {"forward", "backward", "backward_sums"}
SUMS = {"channel_sums", "backward_sums"}


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """The names of the kernels that run, in small grids."""
    names = set()
    call = launch.call_kernel

    def note(kernel, *arguments, **constants):
        names.add(kernel.fn.__name__)
        return call(kernel, *arguments, **constants)

    for module in (launch, covariance_launch):
        monkeypatch.setattr(module, "call_kernel", note)
        monkeypatch.setattr(module, "PROGRAMS", 4)
    monkeypatch.setattr(launch, "PRODUCT", launch.PRODUCT._replace(programs=4))
    return names


class Pair(nn.Module):
    implementation: str
    features: int
    dtype: str
    options: dict
    reuses_x: bool = False

    @nn.compact
    def __call__(self, x, more=None):
        conv = Conv(self.features, dtype=self.dtype, **self.options, name="conv")
        norm = BatchNorm(False, dtype=self.dtype, implementation=self.implementation, name="norm")
        y, x = conv_norm(conv, norm, x, more=more, reuses_x=self.reuses_x)
        return y, x


@pytest.mark.parametrize(
    ("features", "channels", "options", "dtype", "reuses_x", "kernels"),
    [
        (24, [16], {}, "float16", True, COVARIANCE),
        (24, [16], {"strides": 2}, "float16", False, COVARIANCE),
        # The gradient of x has more pixels than what the kernel would add it to.
        (24, [16], {"strides": 2}, "float16", True, SUMS),
        (16, [24], {}, "float16", True, PRODUCT),
        (16, [24], {"strides": 2}, "float16", False, SUMS),
        (16, [16, 24], {}, "float16", True, PRODUCT),
        (72, [16, 24], {}, "float16", False, SUMS),
        (16, [16, 24], {"strides": 2}, "float16", False, SUMS),
        (24, [16], {}, "float32", True, SUMS),
        (16, [16, 24], {}, "float32", False, SUMS),
    ],
)
def test_kernels_give_what_xla_gives(features, channels, options, dtype, reuses_x, kernels, called):
    random = np.random.default_rng(0)
    x, *more = (jnp.asarray(random.standard_normal((2, 5, 4, c)), dtype) for c in channels)
    pair = functools.partial(
        Pair, features=features, dtype=dtype, options=options, reuses_x=reuses_x
    )
    variables = pair("xla").init(jax.random.key(0), x, *more)
    variables = jax.tree.map(lambda a: a + random.random(a.shape, np.float32), variables)

    def loss(params, x, more, implementation):
        (y, x), updates = pair(implementation).apply(
            {**variables, "params": params}, x, *more, mutable=["batch_stats"]
        )
        y, x = (a.astype(jnp.float32) for a in (y, x))
        return jnp.sum(y**3) / y.size + jnp.sum(x**2) / x.size, (y, updates)

    def results(implementation):
        function = functools.partial(loss, implementation=implementation)
        function = jax.value_and_grad(function, (0, 1, 2), has_aux=True)
        return jax.tree.leaves(function(variables["params"], x, more))

    expected = results("xla")
    assert not called
    for got, wanted in zip(results("triton"), expected, strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        tolerance = {"float16": 1e-2, "float32": 1e-5}[dtype]
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.linalg.norm(wanted))
    assert called == kernels
