"""What --config names, and what is said of files that cannot be used."""

import sys

import pytest

from cotnet_jax import configs
from cotnet_jax.command_line import config_option
from cotnet_jax.commands import benchmark, train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        train.parse(["--workdir=run", *arguments])
    assert end.value.code == 1
    return capsys.readouterr().err


def write(path, body, first="from cotnet_jax.configs import digits"):
    path.write_text(f"{first}\n\n\ndef get_config(*arguments):\n    {body}\n")


def test_names_and_paths(here):
    for name in configs.names():
        own = {"digits": "cotnet_tiny", "finetune": "cotnet50"}
        assert config_option.load(name).model.name == own.get(name, name)
    assert "digits" in configs.names()
    assert "default" not in configs.names()
    write(here / "digits.py", "return digits.get_config()")
    (here / "digits").mkdir()
    # Only what looks like a path is one.
    assert config_option.find("digits") == str(configs.path("digits"))
    for path in ("digits.py", "./digits.py", f"{here}/digits.py"):
        assert config_option.find(path) == str(here / "digits.py")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cotnet5", "--config=cotnet5: no such configuration; did you mean --config=cotnet50? The"),
        ("zzz", "--config=zzz: no such configuration. There are cotnet101, cotnet50, "),
        ("mine", "--config=mine: no such configuration; did you mean --config=./mine.py? There"),
        ("nowhere/a.py", "--config=nowhere/a.py: no such file.\n"),
        (
            "configs/cotnet50.py",
            "--config=configs/cotnet50.py: no such file; did you mean --config=cotnet50?\n",
        ),
        ("", "--config=: no such configuration. There are"),
    ],
)
def test_what_is_not_there(here, capsys, given, message):
    write(here / "mine.py", "return digits.get_config()")
    assert error_of(capsys, f"--config={given}").startswith(f"error: {message}")


def test_a_file_of_ones_own(here):
    body = "config = digits.get_config(); config.batch_size = int(arguments[0]); return config"
    write(here / "mine.py", body)
    given = ["--config.epochs=3", "--workdir=run", "--config", "mine.py:32", "--config.notes=a"]
    config = train.parse(given).config
    assert (config.batch_size, config.epochs, config.notes) == (32, 3, "a")
    # The next command line of the same process starts anew.
    assert train.parse(["--config=digits", "--workdir=run"]).config.epochs == 15
    assert config.is_locked
    assert benchmark.parse(["--config=./mine.py:8"]).config.batch_size == 8


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "its get_config() returned NoneType, not an ml_collections.ConfigDict"),
        ("return undefined", "line 5: name 'undefined' is not defined"),
        ("raise ValueError('so\\nso')", "line 5: so so"),
        ("return (", "line 5: '(' was never closed"),
        (
            "config = digits.get_config().lock(); config.epohcs = 3",
            "line 5: no field 'epohcs', did",
        ),
    ],
)
def test_a_file_that_fails(here, capsys, body, message):
    write(here / "mine.py", body)
    assert error_of(capsys, "--config=mine.py").startswith(f"error: --config=mine.py: {message}")


def test_a_file_for_a_checkout_elsewhere(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "configs", None)
    write(here / "mine.py", "return digits.get_config()", first="from configs import digits")
    assert "write: from cotnet_jax.configs import" in error_of(capsys, "--config=mine.py")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.epohcs=3", "--config.epohcs=3: no such field, did you mean epochs? /"),
        ("--config.model.nam=3", "--config.model.nam=3: no such field, did you mean name? /"),
        ("--config.zzz=3", "--config.zzz=3: no such field. /"),
        ("--config.epochs=x", "--config.epochs=x: "),
    ],
)
def test_a_field_that_is_wrong(capsys, override, message):
    said = error_of(capsys, "--config=digits", override)
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
