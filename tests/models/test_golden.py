"""Logits, features and training steps against the reference values of the PyTorch original."""

import pytest
from helpers import golden, quick

from cotnet_jax.tools.golden_replay import replay

pytestmark = pytest.mark.end_to_end


def files(kind, default_models):
    """All golden files of a kind, marked slow unless they are of ``default_models``."""
    return [
        pytest.param(
            path,
            marks=[] if golden.model_of(path) in default_models else pytest.mark.slow,
            id=path.stem,
        )
        for path in golden.golden_files(kind)
    ]


def above_tolerance(comparisons):
    # A NaN is never within its tolerance.
    return [each for each in comparisons if not each[1] <= each[2]]


@pytest.mark.parametrize("path", files("forward", {"cotnet50", "se_cotnetd_50"}))
def test_logits_and_features_of_every_stage(path):
    assert not above_tolerance(replay(path, "float64"))


@pytest.mark.parametrize("path", files("forward", {"cotnet50"}))
def test_single_precision_as_a_user_runs_it(path):
    assert not above_tolerance(replay(path, "float32", quick.USERS_OPTIONS))


@pytest.mark.parametrize("path", files("train", {"cotnet50"}))
def test_four_training_steps(path):
    # The older loops take more than twice as long to compile where convolutions are in float64.
    options = quick.USERS_OPTIONS | {"xla_backend_optimization_level": 0}
    comparisons = list(replay(path, compiler_options=options))
    assert len(comparisons) > 1000
    assert not above_tolerance(comparisons)
