"""The reference implementation's figures, replayed."""

import pytest
from helpers import golden, replay


def files(kind, quick):
    """All golden files of a kind, those of other models than ``quick`` marked slow."""
    return [
        pytest.param(
            path, marks=[] if golden.model_of(path) in quick else pytest.mark.slow, id=path.stem
        )
        for path in golden.golden_files(kind)
    ]


def above(figures):
    """Those that are not within their tolerance."""
    return [figure for figure in figures if not figure[1] <= figure[2]]


@pytest.mark.parametrize("path", files("forward", {"cotnet50", "cotnext50_2x48d", "se_cotnetd_50"}))
def test_logits_and_features_of_every_stage(path):
    assert not above(replay.replay(path, "float64"))


@pytest.mark.parametrize("path", files("forward", {"cotnet50"}))
def test_single_precision_as_a_user_runs_it(path):
    assert not above(replay.replay(path, "float32"))


@pytest.mark.parametrize("path", files("train", {"cotnet50"}))
def test_four_training_steps(path):
    figures = list(replay.replay(path))
    assert len(figures) > 1000
    assert not above(figures)
