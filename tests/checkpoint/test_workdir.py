"""What a run logs and keeps when it starts."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from absl import logging

from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError


@pytest.fixture
def mesh():
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), axis_types=axis_types, devices=jax.devices()[:1])


def test_everything_is_kept_and_nothing_long_is_logged(tmp_path, mesh, monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "info", lambda text, *args: logged.append(text % args))
    config = ml_collections.ConfigDict({"seed": 1, "data": {"mean": (0.5, 0.25)}})
    config.notes = ml_collections.config_dict.placeholder(str)
    params = {"stem": {"kernel": np.zeros((3, 3, 3, 8)), "bias": np.zeros(8)}}
    for _ in range(2):
        Workdir(tmp_path / "run").write_run_metadata(
            config=config, params=params, mesh=mesh, class_names="ab"
        )

    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept == {"seed": 1, "data": {"mean": [0.5, 0.25]}, "notes": None}
    overview = (tmp_path / "run/parameters.txt").read_text()
    assert "stem/kernel" in overview
    assert "Total: 224" in overview
    assert (tmp_path / "run/classes.txt").read_text() == "a\nb\n"
    starts = (tmp_path / "run/starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    start = json.loads(starts[0])
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["orbax-checkpoint"][0].isdigit()
    assert start["mesh"] == {"data": 1}
    assert start["devices"]["count"] == jax.device_count()
    assert start["devices"]["kind"]
    # The screen is for training/summary.py.
    assert not logged


def test_other_processes_write_nothing(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Workdir(tmp_path / "run").write_run_metadata(
        config=ml_collections.ConfigDict(),
        params={},
        mesh=mesh,
        class_names=(),
    )
    assert not any(tmp_path.iterdir())


def test_an_unwritable_workdir_is_one_clear_error(tmp_path, mesh):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Could not write to .*Choose another --workdir"):
        Workdir(tmp_path / "file").write_run_metadata(
            config=ml_collections.ConfigDict(),
            params={},
            mesh=mesh,
            class_names=(),
        )


@pytest.mark.parametrize("name", ["prepare_report.json", "dataset_info.json"])
def test_a_run_does_not_start_in_the_folder_of_a_dataset(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(WorkdirError, match=f"prepared dataset: {name} is in it.*another --workdir"):
        Workdir(tmp_path).check_resume(ml_collections.ConfigDict(), has_steps=False)
    # A run that began there with an earlier version goes on.
    Workdir(tmp_path).checkpoints.mkdir()
    Workdir(tmp_path).check_resume(ml_collections.ConfigDict(), has_steps=False)
