"""The command that compares with goldens; the comparisons themselves are in test_golden.py."""

import pytest

from cotnet_jax.tools import check_golden


@pytest.mark.parametrize(
    ("error", "code", "verdict"),
    [(1e-9, 0, "ok"), (1e-8, 0, "ok"), (2e-8, 1, "ABOVE 1e-08"), (float("nan"), 1, "ABOVE 1e-08")],
)
def test_an_error_above_its_tolerance_fails(tmp_path, monkeypatch, capsys, error, code, verdict):
    file = tmp_path / "model.npz"
    file.touch()
    monkeypatch.setattr("sys.argv", ["check_golden", str(file)])
    monkeypatch.setattr(check_golden, "replay", lambda *_: [("logits", error, 1e-8)])
    assert check_golden.main() == code
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("model.npz  logits ") and line.endswith(verdict)
    assert summary == f"{code} errors above tolerance"


def test_missing_files_are_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_golden", "missing.npz"])
    with pytest.raises(SystemExit):
        check_golden.main()
    assert "no such file: missing.npz" in capsys.readouterr().err
