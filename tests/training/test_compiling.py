"""What happens around a first call, which compiles."""

import gc
import threading

import jax
import jax.numpy as jnp
import pytest

from cotnet_jax.ops import compile_kernels
from cotnet_jax.training import compiling


@pytest.mark.parametrize(("backend", "compiled"), [("gpu", 1), ("cpu", 0)])
def test_kernels_are_compiled_before_the_first_call_on_a_gpu(backend, compiled, monkeypatch):
    done, traces = [], []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(
        compiling, "compile_kernels", lambda traced: done.append(len(traced.jaxpr.eqns))
    )

    def add(state, batch):
        traces.append(len(done))
        return state + batch

    step = compiling.with_kernels_side_by_side(jax.jit(add, donate_argnums=0))
    for count in (1, 2):
        assert step(jnp.full(3, count), jnp.ones(3)).tolist() == [count + 1] * 3
        assert len(done) == compiled
    # Not traced once more for it.
    assert traces == [0]


@pytest.mark.parametrize(("backend", "compiled"), [("gpu", 1), ("cpu", 0)])
def test_a_function_is_compiled_before_its_arguments_are_there(backend, compiled, monkeypatch):
    done, threads = [], []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(compile_kernels, "compile_kernels", done.append)

    @jax.jit
    def add(state, batch):
        threads.append(threading.current_thread())
        assert not gc.isenabled()
        return state + batch

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    step = compiling.compile_ahead(add, shape, shape)
    for number in (1, 2):
        assert step(jnp.full(3, number, jnp.float32), jnp.ones(3)).tolist() == [number + 1] * 3
    # Traced once, and not by a call.
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
    assert len(done) == compiled
    assert gc.isenabled()
    with pytest.raises(TypeError, match="compiled"):
        step(jnp.ones(4), jnp.ones(4))


def test_a_call_raises_what_compiling_ahead_raised():
    def fail(x):
        raise ValueError("no such layer")

    step = compiling.compile_ahead(jax.jit(fail), jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(ValueError, match="no such layer"):
        step(jnp.ones(3))
