"""The commands, and they alone, have JAX keep compiled programs."""

import os
import subprocess
import sys

import jax
import pytest
from absl import logging

from cotnet_jax import interrupt
from cotnet_jax.commands import benchmark, compilation_cache, export, job, predict, train
from cotnet_jax.distributed import initialize

DIR, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


def folder_of_jax():
    return jax.config.values[DIR]


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's settings as without an environment and with a GPU, restored afterwards."""
    before = {name: jax.config.values[name] for name in (DIR, ENABLED)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update(DIR, None)
    jax.config.update(ENABLED, True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def log(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *values: lines.append(text % values))
    return lines


def test_gpus_use_the_users_cache_folder(settings, log, tmp_path):
    compilation_cache.keep_compiled_programs()
    folder = tmp_path / "cache" / "cotnet_jax" / "compiled"
    assert folder_of_jax() == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (line,) = log
    assert f"kept in {folder}; JAX_ENABLE_COMPILATION_CACHE=false turns this off" in line


def test_the_users_own_folder_stays(settings, log, tmp_path):
    jax.config.update(DIR, str(tmp_path / "mine"))
    compilation_cache.keep_compiled_programs()
    assert folder_of_jax() == str(tmp_path / "mine")
    assert str(tmp_path / "mine") in log[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "backend"), [(ENABLED, False, "gpu"), (DIR, "", "gpu"), (DIR, None, "cpu")]
)
def test_it_can_be_off(name, value, backend, settings, log, monkeypatch, tmp_path):
    jax.config.update(name, value)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    compilation_cache.keep_compiled_programs()
    assert not folder_of_jax()
    assert log == list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_warning(settings, log, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compilation_cache.keep_compiled_programs()
    assert folder_of_jax() is None
    assert len(log) == 1 and log[0].startswith("Compiled programs are not kept: ")


@pytest.fixture
def turned_on(monkeypatch, tmp_path):
    """What a command must raise: it ends where it turns the cache on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").touch()
    monkeypatch.setattr(compilation_cache, "keep_compiled_programs", lambda: sys.exit("on"))
    return pytest.raises(SystemExit, match=r"^on$")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predict, ["--weights=there_is_none", "image.png"]),
        (export, ["--weights=there_is_none", "--output=net.stablehlo"]),
    ],
)
def test_commands_turn_it_on(command, arguments, turned_on):
    with turned_on:
        command.main(arguments)


def test_benchmarking_turns_it_on(turned_on):
    with turned_on:
        benchmark._run(benchmark.parse(["--config=digits"]))


def test_training_and_evaluating_turn_it_on_when_processes_are_connected(turned_on, monkeypatch):
    connected = []
    monkeypatch.setattr(initialize, "initialize", lambda *_, **options: connected.append(options))
    monkeypatch.setattr(interrupt, "raise_again", lambda: None)
    options = train.parse(["--config=digits", "--workdir=run"])
    with turned_on:
        job._connect_and_work(lambda: None, options)
    assert len(connected) == 1


def test_the_package_leaves_jax_as_it_is():
    script = f"""
import jax, cotnet_jax
from cotnet_jax.training import loop
cotnet_jax.Predictor, cotnet_jax.load
assert jax.config.values[{DIR!r}] is None
"""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
