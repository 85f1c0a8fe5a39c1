"""Which kernels of batch normalisation the memory check runs; those of the aggregation are in
ops/test_aggregation_triton.py."""

import inspect
import itertools
import re

import jax
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)
from triton import next_power_of_2

from cotnet_jax.ops.batch_norm.triton import launch, product_kernels, sums_kernels
from cotnet_jax.tools import sanitize_kernels

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def called():
    """The kernels that the check calls, as tracing tells: {name: constants of each call}."""
    calls = {}
    call = launch.call_kernel

    def note(kernel, *arguments, **constants):
        calls.setdefault(kernel.fn.__name__, []).append(constants)
        return call(kernel, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "call_kernel", note)
        patch.setattr(sanitize_kernels, "run", jax.eval_shape)
        sanitize_kernels.run_batch_norm_kernels()
    return calls


def kernels(module):
    """The names of a module's kernels: those that are launched write through a pointer."""
    return {
        name
        for name, value in inspect.getmembers(module, lambda value: hasattr(value, "arg_names"))
        if any(argument.endswith("_ptr") for argument in value.arg_names)
        and not name.startswith("_")
    }


def options(calls, *names):
    return {tuple(constants[name] for name in names) for constants in calls}


def test_every_kernel_and_option(called):
    every = kernels(sums_kernels) | kernels(product_kernels)
    assert len(every) == 5
    assert set(called) == every
    assert options(called["backward_sums"], "ACTIVATION") == {("none",), ("relu",), ("silu",)}
    assert options(called["residual_backward_sums"], "SCALED") == {(False,), (True,)}
    for option, values in (
        ("ACTIVATION", {"none", "relu"}),
        ("SCALED", {False, True}),
        ("OTHER", {False, True}),
    ):
        assert {value for (value,) in options(called["backward"], option)} == values


def test_every_layout_of_the_products(called):
    sizes = [16, 40, 64, 72, 128, 200, 256]
    suitable = [
        pair
        for pair in itertools.product(sizes, repeat=2)
        if next_power_of_2(pair[0]) * next_power_of_2(pair[1]) <= 64 * 256
    ]

    def layout(config):
        return (config.rows, config.num_warps, config.num_stages)

    assert {layout(c["CONFIG"]) for c in called["forward"]} == {
        layout(launch.product_config(channels)) for _, channels in suitable
    }
    assert {layout(c["CONFIG"]) for c in called["backward"]} == {
        layout(launch.product_backward_config(*pair, added))
        for pair in suitable
        for added in (False, True)
    }


def test_programs_read_several_blocks_whose_last_is_torn(called):
    for name, calls in called.items():
        for constants in calls:
            product = "CONFIG" in constants
            rows = constants["CONFIG"].rows if product else constants["BLOCK_ROWS"]
            assert constants["ROWS"] % rows, name
            assert constants["ROWS"] > 2 * rows * constants["SLOTS"], name


def test_the_documented_filter_finds_every_kernel(called, capsys):
    with pytest.raises(SystemExit):
        sanitize_kernels.main(["--help"])
    for text in (sanitize_kernels.__doc__, capsys.readouterr().out):
        filters = set(re.findall(r"kns=(\w+)", text))
        assert filters == {"ward", "statistics", "sums"}
        assert all(any(part in name for part in filters) for name in called)
