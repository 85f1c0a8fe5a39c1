"""Kernels of a traced program are found wherever they are called, and lowered side by side."""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

from cotnet_jax.ops import compile_kernels

call_p = Primitive(compile_kernels.PRIMITIVE)
call_p.multiple_results = True
call_p.def_abstract_eval(lambda aval, kernel: [jax.core.ShapedArray(aval.shape, aval.dtype)])


@pytest.fixture
def lowered(monkeypatch):
    """The list of the kernels lowered so far, and what lowers them, each waiting at a barrier."""
    monkeypatch.setattr(compile_kernels.os, "cpu_count", lambda: 8)
    kernels = []

    def lower(context, operand, kernel):
        del context
        kernels.append(kernel)
        lower.barrier.wait(timeout=60)
        return [operand]

    mlir.register_lowering(call_p, lower, platform="cuda")
    return kernels, lower


def call(x, kernel):
    return call_p.bind(x, kernel=kernel)[0]


@jax.custom_vjp
def with_gradient(x):
    return call(x, "forward")


with_gradient.defvjp(lambda x: (call(x, "forward"), x), lambda x, g: (call(g * x, "backward"),))


def program(x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        lambda x: call(x, "mapped"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    x = call(call(x, "twice"), "twice") + inside(x)
    x = jax.lax.platform_dependent(x, cuda=lambda x: call(x, "branch"), default=jnp.sin)
    x = jax.lax.scan(lambda x, _: (call(x, "loop"), None), x, length=3)[0]
    return x + jax.grad(lambda x: with_gradient(x).sum())(x)


def test_all_kernels_are_lowered_once_and_at_the_same_time(lowered):
    kernels, lower = lowered
    expected = ["backward", "branch", "forward", "loop", "mapped", "twice"]
    lower.barrier = threading.Barrier(len(expected))
    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert compile_kernels.compile_kernels(traced) == len(expected)
    assert sorted(kernels) == expected


def test_each_shape_is_another_call(lowered):
    kernels, lower = lowered
    lower.barrier = threading.Barrier(2)
    traced = jax.jit(lambda x, y: (call(x, "one"), call(y, "one"))).trace(1.0, jnp.ones(3))
    assert compile_kernels.compile_kernels(traced) == 2
    assert kernels == ["one", "one"]


def test_errors_come_through(lowered):
    _, lower = lowered
    lower.barrier = threading.Barrier(2)
    lower.barrier.abort()
    traced = jax.jit(lambda x: call(x, "one")).trace(1.0)
    with pytest.raises(threading.BrokenBarrierError):
        compile_kernels.compile_kernels(traced)


def test_programs_without_kernels_have_none():
    traced = jax.jit(lambda x: jnp.sin(x) + 1).trace(1.0)
    assert compile_kernels.compile_kernels(traced) == 0
