"""What the benchmarks of the kernels rely on."""

import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.tools import benchmark_ops


def test_results_lie_on_nan():
    operands = [jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3), jnp.bfloat16)]
    results, poisoned = benchmark_ops.on_poisoned_memory(lambda a, b: (a + 1, b * 2), operands)
    assert poisoned == 2
    np.testing.assert_array_equal(results[0], operands[0] + 1)
    np.testing.assert_array_equal(results[1], operands[1] * 2)


def test_sets_are_different_random_numbers_of_the_shapes_asked_for():
    sets = benchmark_ops.input_sets("backward", 2, AggregationShape(4, 4, 2, 8, 2), "bfloat16")
    filled = benchmark_ops.fill(sets)
    assert len(filled) == len(sets) >= 2
    for operands in filled:
        assert [(a.shape, a.dtype) for a in operands] == [(a.shape, a.dtype) for a in sets[0]]
    assert not np.array_equal(filled[0][0], filled[1][0])
    assert abs(float(np.std(np.asarray(filled[0][1], np.float32))) - 1) < 0.2


@pytest.mark.parametrize(("operation", "direction", "name", "part"), benchmark_ops.PASSES)
def test_errors_in_float32_are_small(operation, direction, name, part):
    operands = benchmark_ops.fill(
        benchmark_ops.input_sets(name, 2, AggregationShape(4, 3, 2, 2, 3), "float32")[:1]
    )[0]
    expected = benchmark_ops.expected_results(operation, direction, operands)[part]
    calls = benchmark_ops.calls("xla")
    variants = [operation] if operation == "plain" else ["separate", "fused"]
    for variant in variants:
        results = calls[variant, direction](*operands)
        results = results if isinstance(results, tuple) else (results,)
        assert benchmark_ops.relative_error(results[: len(expected)], expected) < 1e-6


def test_unknown_shapes_are_named(capsys):
    with pytest.raises(SystemExit):
        benchmark_ops.main(["aggregation", "--shapes=cotnet50,resnet50"])
    assert "--shapes: no resnet50; choose from cotnet50," in capsys.readouterr().err
