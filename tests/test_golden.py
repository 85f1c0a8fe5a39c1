"""The reference implementation's figures, replayed."""

import golden
import pytest
import replay


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", golden.golden_files("forward"), ids=lambda path: path.stem)
def test_logits_and_features_of_every_stage(path, dtype):
    above = [figure for figure in replay.replay(path, dtype) if not figure[1] <= figure[2]]
    assert not above


@pytest.mark.parametrize("path", golden.golden_files("train"), ids=lambda path: path.stem)
def test_four_training_steps(path):
    figures = list(replay.replay(path))
    assert len(figures) > 1000
    assert not [figure for figure in figures if not figure[1] <= figure[2]]
