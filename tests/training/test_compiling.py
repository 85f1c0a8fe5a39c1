"""What happens around a first call, which compiles."""

import jax
import jax.numpy as jnp
import pytest

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
