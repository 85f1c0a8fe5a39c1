"""Which values of weights are refused, and how the report names them."""

import jax
import ml_dtypes
import numpy as np
import pytest

from cotnet_jax.checkpoint.weight_values import (
    WeightValuesError,
    check_weights,
    find_not_finite,
    find_problem,
    named_arrays,
)
from cotnet_jax.tools.goldens import state_dict
from cotnet_jax.weights import from_torch_state_dict, name_map

KINDS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("dtype", KINDS)
def test_values_that_are_no_numbers_are_found_in_every_floating_type(dtype):
    values = np.ones((2, 3), dtype)
    assert find_problem("stem/bn/var", values) is None
    for value, kind in ((np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")):
        values[1, 2] = value
        assert find_problem("head/bias", values) == (
            f"head/bias: 1 of 6 values is {kind}, at [1, 2]"
        )
        assert len(find_not_finite({"bias": values})) == 1


@pytest.mark.parametrize("name", ["batch_stats/stem/bn/var", "layer1.0.bn1.running_var", "var"])
def test_only_variances_must_not_be_negative(name):
    values = np.array([0.0, -0.0, -1e-30, 2], np.float32)
    assert "1 of 4 values is negative" in find_problem(name, values)
    for other in ("stem/bn/mean", "bn1.running_mean", "bn1.variance", "bn1.weight"):
        assert find_problem(other, values) is None


@pytest.mark.parametrize("dtype", [np.complex64, np.int8, np.int64, np.uint8, bool, object])
def test_types_that_are_not_floating(dtype):
    problem = find_problem("fc.weight", np.ones(2, dtype))
    assert problem == f"fc.weight: {np.dtype(dtype)}, which is not a floating-point type"


def test_values_beyond_the_type_that_is_computed_with():
    values = np.array([1e39, 1, -1e39, np.inf, np.nan])
    assert find_problem("fc.bias", values) == (
        "fc.bias: 1 of 5 values is NaN, at [4]; 1 of 5 values is infinite, at [3]; "
        "2 of 5 values are too large for float32, the first at [0]"
    )
    assert find_problem("fc.bias", values[:3], np.float64) is None
    assert find_problem("fc.bias", np.float32(1e5), np.float16).endswith("for float16, at []")


def test_a_value_is_found_in_every_array_of_a_network():
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=10)
    variables = from_torch_state_dict("cotnet_tiny", state_dict(shapes, 0))
    check_weights(variables)
    leaves, structure = jax.tree.flatten(variables)
    assert len(leaves) == 201
    for index, name in enumerate(named_arrays(variables)):
        changed = leaves[index].copy()
        changed.flat[-1] = np.nan
        poisoned = [*leaves[:index], changed, *leaves[index + 1 :]]
        with pytest.raises(WeightValuesError, match=f"1 array of weights .*\n  {name}: 1 of"):
            check_weights(jax.tree.unflatten(structure, poisoned))
    with pytest.raises(WeightValuesError, match="201 arrays of weights") as error:
        check_weights(jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), variables))
    assert len(str(error.value).splitlines()) == 202
