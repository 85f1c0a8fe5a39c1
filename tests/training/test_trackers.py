"""Weights & Biases and trackio, by modules that stand in for them, and further metrics."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.configs import default
from cotnet_jax.training import extras, loop
from cotnet_jax.training.trackers import TrackerError, import_trackers, open_trackers


class Fake(types.ModuleType):
    """Keeps what it is called with."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.calls = []
        self._fails = fails
        self.define_metric = self._keep("define_metric")
        self.log, self.finish, start = map(self._keep, ("log", "finish", "init"))
        self.init = lambda **settings: start(**settings) or self

    def _keep(self, function):
        def call(*args, **kwargs):
            if function in self._fails:
                raise RuntimeError("no network")
            self.calls.append((function, args, kwargs))

        return call

    def of(self, function):
        return [call[1:] for call in self.calls if call[0] == function]


@pytest.fixture
def fake(monkeypatch):
    def make(name, fails=()):
        module = Fake(name, fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def get_config(writers):
    config = default.get_config()
    config.log.writers = writers
    return config


def write(tmp_path, writers, steps):
    with open_trackers(Workdir(tmp_path), get_config(writers)) as trackers:
        for step in steps:
            for tracker in trackers:
                tracker.write_scalars(step, {"loss": jnp.float32(step)})


def test_a_resumed_run_is_the_same_run(tmp_path, fake):
    wandb, trackio = fake("wandb"), fake("trackio")
    write(tmp_path, "wandb,trackio", (1, 2))
    write(tmp_path, "wandb,trackio", (2, 3))
    (first,), (second,) = (
        [settings for _, settings in wandb.of("init")][i : i + 1] for i in (0, 1)
    )
    assert first == second
    assert (first["project"], first["resume"]) == ("cotnet_jax", "allow")
    assert first["config"]["model"]["name"] == "cotnet50"
    assert wandb.of("define_metric")[0] == (("*",), {"step_metric": "step"})
    logged = [values for (values,), _ in wandb.of("log")]
    assert logged == [{"loss": float(step), "step": step} for step in (1, 2, 2, 3)]
    names = {settings["name"] for _, settings in trackio.of("init")}
    assert len(names) == 1
    assert [kwargs["step"] for _, kwargs in trackio.of("log")] == [1, 2, 2, 3]
    assert len(wandb.of("finish")) == len(trackio.of("finish")) == 2
    # Another run has another id.
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "wandb", ())
    assert wandb.of("init")[2][1]["id"] != first["id"]


def test_what_is_not_installed_is_one_error_before_anything_is_written(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    config = get_config("wandb,trackio")
    monkeypatch.setattr(loop, "set_up_training", lambda _: types.SimpleNamespace(config=config))
    message = (
        r"--config.log.writers=wandb,trackio: not installed: wandb, trackio; type pip install "
        r"wandb trackio, or leave the option out"
    )
    with pytest.raises(TrackerError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert import_trackers("") == {}


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, fake, caplog):
    module = fake("wandb", fails=("log",))
    write(tmp_path, "wandb", (1, 2))
    assert caplog.text.count("wandb is no longer written to: no network") == 1
    assert not module.of("finish")
    fake("wandb", fails=("init",))
    with pytest.raises(TrackerError, match="wandb cannot start: no network"):
        write(tmp_path, "wandb", ())


def test_other_processes_have_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, "wandb", (1,))
    assert not any(tmp_path.iterdir())


def test_gradient_norms_of_each_stage():
    gradients = {"stem": {"a": jnp.array([3.0, 4.0])}, "stage1_block0": {"b": jnp.array([2.0])}}
    gradients["stage1_block1"] = {"b": jnp.array([[1.0, 2.0]])}
    norms = extras.gradient_norms(gradients)
    assert list(norms) == ["gradient_norm/stem", "gradient_norm/stage1"]
    np.testing.assert_allclose(list(norms.values()), [5, 3])


def test_what_is_measured_on_request(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device(None), Device({"peak_bytes_in_use": 3 * 2**30})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    line = {"images_per_second": 50.0}
    assert extras.measured("", line, 100) == {}
    assert extras.measured("step_time", line, 100) == {"step_seconds": 2.0}
    assert extras.measured("step_time", {}, 100) == {}
    assert extras.measured("all", line, 100) == {"step_seconds": 2.0, "memory_peak_gib": 3.0}
    devices.pop()
    assert extras.measured("memory", line, 100) == {}
    assert extras.wanted("memory, gradient_norms", "gradient_norms")
    assert not extras.wanted("memory", "gradient_norms")


def test_images_as_a_grid():
    images = jnp.arange(6, dtype=jnp.uint8)[:, None, None, None] * jnp.ones((2, 3, 3), jnp.uint8)
    grid = extras.image_grid(images)
    assert grid.shape == (4, 12, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[::2, ::3, 0], [[0, 1, 2, 3], [4, 5, 0, 0]])
    assert extras.image_grid(jnp.zeros((50, 2, 3, 3), jnp.uint8)).shape == (8, 12, 3)
