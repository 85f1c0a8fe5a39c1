"""The check of batch normalisation's kernels, in Triton's interpreter."""

import jax.numpy as jnp
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)

from cotnet_jax.ops import dispatch
from cotnet_jax.ops.batch_norm import plain
from cotnet_jax.ops.batch_norm.triton import covariance_launch, launch
from cotnet_jax.ops.local_aggregation.triton import launch as aggregation_launch
from cotnet_jax.ops.local_aggregation.triton import tuned_configs
from cotnet_jax.tools import batch_norm_checks
from cotnet_jax.tools.batch_norm_checks import Case

pytestmark = pytest.mark.kernels
CASES = {Case(4, 3, 24, activation="silu"), Case(3, 3, 16, activation="relu", residual=True)}
# In float32: the interpreter multiplies no matrices of bfloat16.
PRODUCTS = {
    Case(3, 3, 16, channels_in=16, reuses_x=True, more=24),
    Case(3, 3, 24, channels_in=16, residual=True, drops=True, reuses_x=True, by_covariance=True),
}


def test_the_cases_of_a_model_are_found(monkeypatch):
    gpu = tuned_configs.Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)
    monkeypatch.setattr(aggregation_launch, "gpu", lambda: gpu)
    monkeypatch.setattr(dispatch, "kernel_available", lambda: True)
    cases = batch_norm_checks.find_cases("cotnet_tiny", 64, jnp.bfloat16)
    # Of the stem, which halves the image.
    assert any(case.height == case.width == 32 and not case.channels_in for case in cases)
    assert any(case.channels_in and case.reuses_x for case in cases)
    assert any(case.more for case in cases)
    assert any(case.by_covariance and case.residual and case.drops for case in cases)
    assert {case.activation for case in cases} == {"none", "relu", "silu"}
    without = batch_norm_checks.find_cases("cotnet_tiny", 64, jnp.float32)
    assert not any(case.channels_in for case in without)


def test_right_kernels_pass_and_wrong_ones_do_not(monkeypatch, capsys):
    cases = {"float32": CASES | PRODUCTS, "bfloat16": CASES}
    monkeypatch.setattr(
        batch_norm_checks, "find_cases", lambda name, size, dtype: cases[str(dtype)]
    )
    for module in (launch, covariance_launch):
        monkeypatch.setattr(module, "PROGRAMS", 4)
    monkeypatch.setattr(launch, "PRODUCT", launch.PRODUCT._replace(programs=4))
    monkeypatch.setattr(launch, "BLOCK", 256)
    assert batch_norm_checks.check_cases(["cotnet50"], [224], images=2)
    printed = capsys.readouterr().out
    assert "4x3 24 silu" in printed and "3x3 16 relu residual" in printed
    assert "3x3 16 + 24 -> 16 none reuses_x" in printed
    assert "on NaN: 5 of 5" in printed

    def wrong(gradient, x, *vectors, activation):
        return 1.01 * plain.backward_sums(gradient, x, *vectors, activation=activation)

    monkeypatch.setattr(launch, "backward_sums", wrong)
    assert not batch_norm_checks.check_cases(["cotnet50"], [224], images=2)
