"""The poolings' kernels in Triton's interpreter, against XLA's forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)
from helpers.lowering import lower_alone

from cotnet_jax.ops import dispatch, pooling
from cotnet_jax.ops.pooling.triton import launch

pytestmark = pytest.mark.kernels
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(launch, "BLOCK", 128)
    monkeypatch.setattr(launch, "BLOCK_CHANNELS", 16)


def both(function, implementation, x, gradient):
    y, pullback = jax.vjp(functools.partial(function, implementation=implementation), x)
    return [np.asarray(a, np.float32) for a in (y, pullback(gradient)[0])]


@pytest.mark.parametrize(
    ("function", "size", "channels", "dtype"),
    [
        (pooling.max_pool, (7, 6), 20, "float32"),
        (pooling.max_pool, (1, 5), 24, "float16"),
        (pooling.max_pool, (4, 4), 16, "bfloat16"),
        (pooling.average_pool, (3, 6), 20, "bfloat16"),
        (pooling.average_pool, (1, 5), 24, "float32"),
    ],
)
def test_kernels_give_what_xla_gives(function, size, channels, dtype, monkeypatch):
    # Few different values, so that windows have several maxima; and one NaN.
    x = jnp.asarray(RANDOM.integers(0, 4, (2, *size, channels)) / 3, dtype)
    x = x.at[0, 0, 1, 0].set(jnp.nan)
    shape = (2, -(-size[0] // 2), -(-size[1] // 2), channels)
    gradient = jnp.asarray(RANDOM.standard_normal(shape), dtype)
    got = both(function, "triton", x, gradient)
    # Not the form for CPUs.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, cpu, default: default(x))
    for array, wanted in zip(got, both(function, "xla", x, gradient), strict=True):
        # The interpreter rounds to short floats towards zero.
        rtol = max(1e-6, 2 * float(jnp.finfo(dtype).eps))
        np.testing.assert_allclose(array, wanted, rtol=rtol, atol=1e-7)


def test_the_kernel_is_chosen_at_lowering(monkeypatch):
    x = jnp.asarray(RANDOM.standard_normal((2, 4, 6, 16)), jnp.float32)
    for function in (pooling.max_pool, pooling.average_pool):

        def gradient(x, function=function):
            return jax.grad(lambda x: (function(x) ** 2).sum())(x)

        without = gradient(x)
        with monkeypatch.context() as beside_a_gpu:
            beside_a_gpu.setattr(dispatch, "kernel_available", lambda: True)
            beside_a_gpu.setattr(dispatch, "SMALLEST", 0)
            assert "platform_index" in str(jax.make_jaxpr(gradient)(x))
            np.testing.assert_allclose(gradient(x), without, rtol=1e-6)


def test_vmap_gives_what_it_gives_one_by_one():
    x = jnp.asarray(RANDOM.standard_normal((3, 2, 4, 6, 16)), jnp.float32)
    for function in (pooling.max_pool, pooling.average_pool):

        def gradient(x, implementation, function=function):
            return jax.grad(lambda x: (function(x, implementation) ** 2).sum())(x)

        got = jax.vmap(functools.partial(gradient, implementation="triton"))(x)
        wanted = jax.vmap(functools.partial(gradient, implementation="xla"))(x)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


LOWERING = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cotnet_jax.ops.pooling.triton import kernels

sizes = {"PIXELS": 8000, "HEIGHT": 15, "WIDTH": 14, "C": 72, "BLOCK": 16, "BLOCK_C": 128}
for kernel in (kernels.forward, kernels.backward):
    for capability in (80, 90):
        for maximum in (True, False):
            constants = sizes | {"MAXIMUM": maximum}
            signature = {
                name: "constexpr" if name in constants else
                "*u8" if name == "position_ptr" else "*bf16"
                for name in kernel.arg_names
            }
            target = GPUTarget("cuda", capability, 32)
            built = compile(ASTSource(kernel, signature, constants), target=target)
            assert f".target sm_{capability}" in built.asm["ptx"]
            print(kernel.fn.__name__)
"""


def test_kernels_lower_to_ptx(tmp_path):
    assert len(lower_alone(LOWERING, tmp_path)) == 8
