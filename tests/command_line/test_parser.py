"""Options, their help and their errors."""

from pathlib import Path

import pytest

from cotnet_jax import command_line


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
