"""Help and errors of the commands."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cotnet_jax import command_line

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "main.py": ["main.py"],
    "convert_torch_weights.py": ["convert_torch_weights.py"],
    "predict": ["-m", "cotnet_jax.predict"],
    "prepare": ["-m", "cotnet_jax.data.prepare"],
}


def run(command, *arguments, **options):
    return subprocess.run(
        [sys.executable, *options.get("python", ()), *COMMANDS[command], *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_begins_with_examples(command):
    result = run(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[2] == "Examples:"
    assert [line.split()[:2] for line in lines[3:6]] == [["python", COMMANDS[command][0]]] * 3
    assert lines[6] == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_no_arguments_are_one_error_and_the_examples(command):
    result = run(command)
    assert (result.returncode, result.stdout) == (1, "")
    message, title, *examples = result.stderr.splitlines()
    assert message.startswith("error: ")
    assert message.endswith(" is missing")
    assert title == "Examples:"
    assert len(examples) == 3


@pytest.mark.parametrize("command", ["main.py", "convert_torch_weights.py", "predict"])
def test_help_imports_no_jax(command):
    result = run(command, "--help", python=["-X", "importtime"])
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "cotnet_jax" in imported
    assert not imported & {"jax", "flax", "orbax.checkpoint", "tensorflow_datasets", "grain"}


def parse(arguments, capsys):
    """What a parser of a few options says to arguments: (options, error)."""
    parser = command_line.Parser(
        "Do it.", ["python do.py --weights=PATH 1"], replaced={"--which": "--kind=ema|raw"}
    )
    command_line.add_weights(parser, "Weights.", required=True)
    parser.add_argument("--count", type=command_line.positive, default=3, help="(%(default)s)")
    parser.add_argument("files", nargs="*", metavar="FILE", help="Files.")
    try:
        return vars(parser.parse_args(arguments)), ""
    except SystemExit as end:
        assert end.code == 1
        return None, capsys.readouterr().err


def test_options(capsys):
    options, _ = parse(["--weights=x", "--kind", "raw", "a", "b", "--count=2"], capsys)
    assert options == {
        "weights": str(Path("x").absolute()),
        "kind": "raw",
        "count": 2,
        "files": ["a", "b"],
    }
    options, _ = parse(["--weights", "x"], capsys)
    assert options == {"weights": str(Path("x").absolute()), "kind": None, "count": 3, "files": []}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--weights=x", "--cuont=1"], "unknown option --cuont; did you mean --count?"),
        (["--weights=x", "--zzz"], "unknown option --zzz"),
        (["--weights=x", "--coun=1"], "unknown option --coun; did you mean --count?"),
        (["--weights=x", "--which=raw"], "--which is called --kind=ema|raw now"),
        (["--weights=x", "--kind=best"], "--kind: must be ema|raw, not 'best'"),
        (["--weights=x", "--count=0"], "--count: must be an integer of 1 or more, not '0'"),
        (["--weights=x", "--count=1.5"], "--count: must be an integer of 1 or more, not '1.5'"),
        (
            ["--weights=raw"],
            "--weights: must be the path of the weights; choose their kind by --kind=",
        ),
        (["--zzz", "a"], "unknown option --zzz; --weights=PATH is missing\nExamples:\n  python do"),
    ],
)
def test_errors(capsys, arguments, error):
    assert parse(arguments, capsys)[1].startswith(f"error: {error}")


def test_weights_may_be_called_as_their_kind(tmp_path, monkeypatch, capsys):
    (tmp_path / "ema").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["--weights=ema"], capsys)[0]["weights"] == str(tmp_path / "ema")


def parser_of(command):
    if command == "predict":
        return importlib.import_module("cotnet_jax.predict").make_parser()
    return runpy.run_path(str(ROOT / command))["make_parser"]()


@pytest.mark.parametrize("command", ["convert_torch_weights.py", "predict"])
def test_examples_are_accepted(command):
    parser = parser_of(command)
    for example in parser.examples:
        arguments = example.split(COMMANDS[command][-1])[1].split()
        assert parser.parse_args(arguments).weights
