"""Which kernels of batch normalisation and of the poolings the memory check runs; those of the
aggregation are in ops/test_aggregation_triton.py."""

import inspect
import re

import jax
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)

from cotnet_jax.ops.batch_norm.triton import (
    covariance_kernels,
    covariance_launch,
    launch,
    product_kernels,
    sums_kernels,
)
from cotnet_jax.ops.pooling.triton import kernels as pooling_kernels
from cotnet_jax.ops.pooling.triton import launch as pooling_launch
from cotnet_jax.tools import sanitize_kernels

pytestmark = pytest.mark.kernels
YES_AND_NO = {False, True}


@pytest.fixture(scope="module")
def called():
    """The kernels that the check calls, as tracing tells: {kernel: constants of each call}."""
    calls = {}
    call = launch.call_kernel

    def note(kernel, *arguments, **constants):
        calls.setdefault(kernel, []).append(constants)
        return call(kernel, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        for module in (launch, covariance_launch, pooling_launch):
            patch.setattr(module, "call_kernel", note)
        patch.setattr(sanitize_kernels, "run", jax.eval_shape)
        sanitize_kernels.run_batch_norm_kernels()
        sanitize_kernels.run_pooling_kernels()
    return calls


def kernels(module):
    """A module's kernels: those that are launched write through a pointer."""
    return {
        value
        for name, value in inspect.getmembers(module, lambda value: hasattr(value, "arg_names"))
        if any(argument.endswith("_ptr") for argument in value.arg_names)
        and not name.startswith("_")
    }


def options(calls, name):
    return {constants[name] for constants in calls}


def test_every_kernel_and_option(called):
    modules = (sums_kernels, product_kernels, covariance_kernels, pooling_kernels)
    every = set().union(*map(kernels, modules))
    assert len(every) == 11
    assert set(called) == every
    for kernel, option, values in (
        (sums_kernels.backward_sums, "ACTIVATION", {"none", "relu", "silu"}),
        (sums_kernels.residual_backward_sums, "SCALED", YES_AND_NO),
        (product_kernels.backward, "ACTIVATION", {"none", "relu"}),
        (product_kernels.backward, "OTHER", YES_AND_NO),
        (covariance_kernels.affine, "RELU", YES_AND_NO),
        (covariance_kernels.affine, "RESIDUAL", YES_AND_NO),
        (covariance_kernels.affine, "SCALED", YES_AND_NO),
        (covariance_kernels.gradient_products, "RELU", YES_AND_NO),
        (covariance_kernels.gradient_products, "SCALED", YES_AND_NO),
        (covariance_kernels.input_gradient, "SCALED", YES_AND_NO),
        (covariance_kernels.input_gradient, "OTHER", YES_AND_NO),
        (pooling_kernels.forward, "MAXIMUM", YES_AND_NO),
        (pooling_kernels.backward, "MAXIMUM", YES_AND_NO),
    ):
        assert options(called[kernel], option) == values, (kernel, option)
    for kernel in (product_kernels.forward, product_kernels.backward):
        assert {more > 0 for more in options(called[kernel], "MORE")} == YES_AND_NO


def test_every_layout_of_the_covariances(called):
    sizes = [(k, n) for k in range(16, 257, 8) for n in range(k, 513, 8)]
    for name, every in (
        ("moments", {covariance_launch.moments_config(k) for k, _ in sizes}),
        ("affine", {covariance_launch.affine_config(*size) for size in sizes}),
        ("gradient_products", {covariance_launch.gradient_products_config(*s) for s in sizes}),
        ("input_gradient", {covariance_launch.input_gradient_config(k) for k, _ in sizes}),
    ):
        # Of few channels a block has as many columns as there are, rounded up.
        large = {config for config in every if config.columns >= 64}
        got = options(called[getattr(covariance_kernels, name)], "CONFIG")
        assert large <= got <= every, name


def test_programs_read_several_blocks_whose_last_is_torn(called):
    for kernel, calls in called.items():
        for constants in calls:
            if "PIXELS" in constants and "BLOCK" in constants:
                assert constants["PIXELS"] % constants["BLOCK"], kernel
                continue
            rows = constants["CONFIG"].rows if "CONFIG" in constants else constants["BLOCK_ROWS"]
            assert constants["ROWS"] % rows, kernel
            assert constants["ROWS"] > 2 * rows * constants.get("SLOTS", 1), kernel


def test_the_documented_filter_finds_every_kernel(called, capsys):
    with pytest.raises(SystemExit):
        sanitize_kernels.main(["--help"])
    for text in (sanitize_kernels.__doc__, capsys.readouterr().out):
        filters = set(re.findall(r"kns=(\w+)", text))
        assert filters == {"ward", "statistics", "sums", "moments", "affine", "gradient"}
        assert all(any(part in kernel.fn.__name__ for part in filters) for kernel in called)
