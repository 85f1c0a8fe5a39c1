"""Commands are printed as the user calls them."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cotnet_jax import command_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Let this process look as if it had been started in another way."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name in ("cotnet-train", "cotnet-predict"):
        (tmp_path / "bin" / name).touch(mode=0o755)

    def start(*typed, module=None):
        monkeypatch.setattr(sys, "orig_argv", list(typed))
        script = typed[0] if typed[0].startswith("/") or len(typed) == 1 else typed[1]
        monkeypatch.setattr(sys, "argv", [script])
        spec = ModuleSpec(module, None) if module else None
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))

    return start


def test_as_typed(start, tmp_path, monkeypatch):
    def check(train, evaluate, predict):
        assert command_line.command("train") == train
        text = "cotnet-train --workdir=x; 'cotnet-evaluate' ./cotnet-predict"
        assert command_line.as_typed(text) == f"{train} --workdir=x; '{evaluate}' ./cotnet-predict"
        assert command_line.command("predict") == predict

    installed = ("cotnet-train", "cotnet-evaluate", "cotnet-predict")
    start(str(tmp_path / "bin/cotnet-train"))
    check(*installed)
    # Not on PATH: by its path, as typed.
    start("venv/bin/cotnet-predict")
    check(*(f"venv/bin/{name}" for name in installed))
    monkeypatch.chdir(ROOT)
    start("venv/bin/python", "main.py")
    other = "venv/bin/python -m cotnet_jax"
    own = "venv/bin/python main.py"
    check(own, f"{own} --mode=evaluate", f"{other} predict")
    start("python", "convert_torch_weights.py")
    assert command_line.command("convert") == "python convert_torch_weights.py"
    start("python", "-m", module="cotnet_jax.__main__")
    check(*(f"python -m cotnet_jax {name}" for name in ("train", "evaluate", "predict")))
    start("python", "-m", module="cotnet_jax.predict")
    check(
        "python -m cotnet_jax train",
        "python -m cotnet_jax evaluate",
        "python -m cotnet_jax.predict",
    )
    # Programs of others, a main.py among them, and notebooks.
    start("python", "-m", module="pytest.__main__")
    check(*installed)
    monkeypatch.chdir(tmp_path)
    Path("main.py").touch()
    start("python", "main.py")
    check(*installed)
