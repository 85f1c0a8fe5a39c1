"""The curves of runs: drawn from metrics.jsonl, and never in the way of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from cotnet_jax.reports import curves


def write_run(workdir, loss=1.0, **more):
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "loss": loss / step, "learning_rate": 0.1} for step in (1, 2, 3)]
    lines.append({"step": 2, "loss": None, "ema_top1": 50.0, **more})
    lines.append({"step": 3, "ema_top1": 60.0, "raw_top1": 40.0})
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')


def test_a_run_is_drawn_into_its_workdir(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    write_run(tmp_path / "a $run$ 1_2")
    curves.write_after_training(tmp_path / "a $run$ 1_2")
    with Image.open(tmp_path / "a $run$ 1_2" / "curves.png") as image:
        assert min(image.size) > 500
    assert "curves.png" in caplog.text and caplog.records[-1].levelname == "INFO"


def test_curves_leave_out_what_is_not_known(tmp_path):
    write_run(tmp_path / "run")
    (run,) = curves.read_runs([tmp_path / "run"])
    steps, losses = run.curve("loss")
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_allclose(losses, [1, 1 / 3])
    assert run.curve("images_per_second")[0].size == 0


def test_nothing_is_no_figure(tmp_path):
    with pytest.raises(ValueError, match="no run is given"):
        curves.write([], tmp_path / "curves.png")
    assert not any(tmp_path.iterdir())


def test_runs_are_compared_in_one_figure(tmp_path):
    for name in ("x/50/run", "x/101/run"):
        write_run(tmp_path / name)
    runs = curves.read_runs([tmp_path / "x/50/run", tmp_path / "x/101/run"])
    assert [run.name for run in runs] == ["50/run", "101/run"]
    figure = curves.draw(runs)
    loss, top1, rate, speed = figure.axes
    assert [line.get_label() for line in loss.lines] == ["50/run", "101/run"]
    assert [line.get_label() for line in top1.lines] == [
        "50/run EMA",
        "50/run raw",
        "101/run EMA",
        "101/run raw",
    ]
    assert len(rate.lines) == 2 and not speed.lines
    # A run has its colour everywhere.
    assert {line.get_color() for line in top1.lines} == {line.get_color() for line in loss.lines}


def test_folders_without_metrics_are_listed_together(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    expected = r"(?s)^3 of .*empty: no metrics.jsonl.*missing: no such folder.*new.*no line"
    with pytest.raises(ValueError, match=expected):
        curves.read_runs([tmp_path / name for name in ("empty", "good", "missing", "new")])


@pytest.mark.parametrize(
    "problem", [ImportError("no\nmatplotlib"), MemoryError(), OSError(28, "x")]
)
def test_a_drawing_problem_is_one_line_and_does_not_end_a_run(
    tmp_path, monkeypatch, caplog, problem
):
    def fail(*_, **__):
        raise problem

    write_run(tmp_path)
    monkeypatch.setattr(curves, "to_png", fail)
    curves.write_after_training(tmp_path)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "curves.png was not drawn: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not (tmp_path / "curves.png").exists()
