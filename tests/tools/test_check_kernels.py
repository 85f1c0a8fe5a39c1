"""The check of the kernels, with XLA's implementation in their place."""

import functools

import jax
import jax.numpy as jnp
import pytest

from cotnet_jax.models.cotnet import create_model
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.tools import check_kernels


@pytest.fixture
def small(monkeypatch):
    """Check one small shape, by XLA; return a function that spoils one of its results."""
    operations = check_kernels.operations("xla")
    shapes = {AggregationShape(4, 3, 2, 2, 3)}
    monkeypatch.setattr(check_kernels, "aggregation_shapes", lambda name, size: shapes)
    monkeypatch.setattr(check_kernels, "operations", lambda implementation: operations)

    def spoil(name, number):
        function = operations[name]

        def spoilt(*operands):
            results = [*function(*operands)]
            results[number] = results[number] * 1.1
            return tuple(results)

        operations[name] = spoilt

    return spoil


def test_what_xla_computes_is_within_tolerance(small, capsys):
    assert check_kernels.check_shapes(["cotnet50"], [224])
    printed = capsys.readouterr().out
    assert "4x3x12, 2 groups" in printed and "activated" in printed
    assert "on NaN: 5 of 5" in printed


@pytest.mark.parametrize(("name", "number"), [("plain", 2), ("normalized", 3), ("activated", 0)])
def test_a_wrong_result_is_found(name, number, small):
    small(name, number)
    assert not check_kernels.check_shapes(["cotnet50"], [224])


def test_smooth_networks_have_neither_relu_nor_maxima():
    model = create_model("cotnet50", features_only=True, out_indices=(1,))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def trace():
        init = functools.partial(model.init, train=True)
        return str(jax.make_jaxpr(init)(jax.random.key(0), images))

    kinks = ("name=relu", "reduce_window_max")
    assert all(kink in trace() for kink in kinks)
    with check_kernels.smooth():
        assert not any(kink in trace() for kink in kinks)
