"""What holds for every command, in every way to start it."""

import importlib
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cotnet_jax import __main__ as package_main
from cotnet_jax.commands import SUMMARIES

ROOT = Path(__file__).parents[2]
# The ways to start a command without installing it.
WAYS = [
    *(f"-m cotnet_jax {name}" for name in SUMMARIES),
    "main.py",
    "convert_torch_weights.py",
    "-m cotnet_jax.predict",
    "-m cotnet_jax.data.prepare",
]
# It imports JAX first.
SLOW = pytest.param("-m cotnet_jax.tools.benchmark_step", marks=pytest.mark.slow)


def run(way, *arguments, python=()):
    # By name, as users type it; the name of the Python is part of what is printed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["python", *python, *way.split(), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
    )


@pytest.mark.parametrize("way", WAYS)
def test_help_fits_a_screen_begins_with_examples_and_imports_no_jax(way):
    result = run(way, "--help", python=["-X", "importtime"])
    assert result.returncode == 0
    imported = [line.split("|")[-1].strip() for line in result.stderr.splitlines()]
    assert "cotnet_jax" in imported
    heavy = {"jax", "flax", "orbax.checkpoint", "tensorflow_datasets", "grain"}
    assert not heavy.intersection(imported)
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[2] == "Examples:"
    assert all(line.startswith(f"  python {way} ") for line in lines[3:6])
    assert lines[6] == ""


@pytest.mark.parametrize("way", [*WAYS, SLOW])
def test_no_arguments_are_one_error_and_the_examples(way):
    result = run(way)
    assert (result.returncode, result.stdout) == (1, "")
    message, title, *examples = result.stderr.splitlines()
    assert message.startswith("error: ")
    assert message.endswith(" is missing")
    assert title == "Examples:"
    assert len(examples) == 3
    assert all(line.startswith(f"  python {way} ") for line in examples)


@pytest.mark.parametrize("name", SUMMARIES)
def test_examples_are_accepted(name):
    module = importlib.import_module(f"cotnet_jax.commands.{name}")
    for example in module.EXAMPLES:
        command, *arguments = shlex.split(example)
        assert command == f"cotnet-{name}"
        if "--config=./mine.py" not in arguments:
            assert module.parse(arguments)


@pytest.mark.parametrize("name", SUMMARIES)
def test_version(name, capsys):
    module = importlib.import_module(f"cotnet_jax.commands.{name}")
    with pytest.raises(SystemExit) as end:
        module.parse(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("cotnet_jax ")


def test_every_command_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {
        f"cotnet-{name}": f"cotnet_jax.commands.{name}:main" for name in SUMMARIES
    }


def test_the_package_lists_its_commands(capsys):
    assert package_main.main([]) == 0
    listed = capsys.readouterr().out
    assert "training" in listed
    for name, summary in SUMMARIES.items():
        assert [f"cotnet-{name}", summary] in [
            line.split(maxsplit=1) for line in listed.splitlines()
        ]
    assert package_main.main(["trian"]) == 1
    assert "no command 'trian'; did you mean cotnet-train?" in capsys.readouterr().err
