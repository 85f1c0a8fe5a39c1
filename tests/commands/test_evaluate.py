"""The options of cotnet-evaluate and cotnet-plot, and what they lead to."""

from pathlib import Path

import pytest

import main
from cotnet_jax import reports
from cotnet_jax.commands import evaluate, job, plot
from cotnet_jax.training import evaluate as plain


def error_of(capsys, parse, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(list(arguments))
    assert exit.value.code == 1
    return capsys.readouterr().err


def test_a_workdir_is_enough():
    options = evaluate.parse(["--workdir=runs/a"])
    assert options.workdir == str(Path("runs/a").absolute())
    assert (options.weights, options.config_named, options.fields) == ([], False, {})


def test_fields_that_are_set_are_known():
    options = evaluate.parse(
        [
            "--weights=a",
            "--config.eval.batch_size=8",
            "--noconfig.accept_classes",
            "--config.data.crop",
            "0.5",
            "--config.data.mean=(0.1, 0.2, 0.3)",
        ]
    )
    assert options.fields == {
        "eval.batch_size": 8,
        "accept_classes": False,
        "data.crop": 0.5,
        "data.mean": (0.1, 0.2, 0.3),
    }


def test_a_configuration_may_be_named():
    options = evaluate.parse(["--config=digits", "--config.init_from=/a", "--kind=raw"])
    assert options.config_named and options.config.model.name == "cotnet_tiny"
    assert (options.weights, options.kind) == (["/a"], "raw")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=digits"], "--workdir=DIR is missing"),
        (["--weights=/a", "--all_checkpoints"], "--all_checkpoints: needs --workdir=DIR, and no"),
        (["--workdir=/a", "--weights=/b", "--all_checkpoints"], "and no --weights"),
        (["--weights=/a", "--weights=/b", "--no_report"], "--no_report: there is nothing else"),
        (["--workdir=/a", "--no_report", "--output=/b"], "--no_report: there is nothing else"),
        (["--weights=/a", "--config.init_from=/b"], "--weights=/a and --config.init_from=/b"),
        (["--workdir=/a", "--dta=/b"], "unknown option --dta; did you mean --data?"),
        (["--workdir=/a", "--config.eval.batchsize=3"], "no such field, did you mean batch_size"),
    ],
)
def test_wrong_options_are_one_clear_error(capsys, arguments, message):
    assert message in error_of(capsys, evaluate.parse, *arguments)


def test_each_mode_of_main_has_its_own_options(capsys, monkeypatch):
    chosen = []
    for mode in main.MODES.values():
        monkeypatch.setattr(mode, "run", chosen.append)
    main.main(["--mode=evaluate", "--workdir=/a", "--all_checkpoints"])
    main.main(["--mode", "evaluate", "--workdir=/b"])
    main.main(["--config=digits", "--workdir=/c"])
    assert [(each.mode, each.workdir) for each in chosen] == [
        ("evaluate", "/a"),
        ("evaluate", "/b"),
        ("train", "/c"),
    ]
    message = error_of(capsys, main.main, "--config=digits", "--workdir=/a", "--data=/b")
    assert "unknown option --data" in message
    assert "train|evaluate" in error_of(capsys, main.main, "--mode=test", "--workdir=/a")


@pytest.fixture
def work(monkeypatch):
    """What the command calls, with the weights and the folder: nothing is evaluated."""
    called = []
    metrics = {"count": 10, "given_top1": 50.0}
    row = {"weights": "a", "model": "m", "step": 3, "kind": "ema", "top1": 50.0, "top5": 100.0}
    row |= {"ece": 1.0, "images": 10, "seconds": 2.0}

    def record(name, result):
        return lambda config, *rest, **named: called.append((name, config, named)) or result

    def configure(config, **given):
        return {"named": config is not None, **given}

    monkeypatch.setattr(reports, "evaluation_config", configure)
    monkeypatch.setattr(reports, "checkpoints_of", lambda workdir: [f"{workdir}/1", f"{workdir}/2"])
    monkeypatch.setattr(reports, "evaluate", record("report", (metrics, Path("/reports/one"))))
    monkeypatch.setattr(reports, "evaluate_each", record("table", ([row, row], Path("/t.csv"))))
    monkeypatch.setattr(plain, "evaluate_only", record("plain", metrics))
    said = []
    monkeypatch.setattr(job, "run", lambda load, o: said.append(load()(o.config, o.workdir)[1]))

    def work(*arguments):
        evaluate.run(evaluate.parse(list(arguments)))
        return *called.pop(), said.pop()

    return work


def test_one_report_and_where_it_is(work):
    name, config, named, said = work("--workdir=/a", "--data=mine", "--split=s", "--output=/o")
    assert (name, named) == ("report", {"output": "/o"})
    assert (config["named"], config["workdir"], config["weights"]) == (False, "/a", None)
    assert (config["data"], config["split"]) == ("mine", "s")
    assert "look at the report:  /reports/one/report.html" in said
    assert "50.00 % (given weights)" in said
    name, config, *_ = work("--config=digits", "--weights=/w")
    assert (name, config["named"], config["weights"]) == ("report", True, "/w")
    assert work("--workdir=/a", "--no_report")[0] == "plain"


def test_a_table_of_many(work):
    name, configs, _, said = work("--workdir=/a", "--all_checkpoints", "--kind=raw")
    assert name == "table"
    assert [config["weights"] for config in configs] == ["/a/1", "/a/2"]
    assert {config["kind"] for config in configs} == {"raw"}
    assert "weights  model  step  kind  top1   top5" in said and "/t.csv" in said
    _, configs, *_ = work("--weights=/a", "--weights=/b")
    assert [config["weights"] for config in configs] == ["/a", "/b"]


def test_curves_go_into_a_run_or_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plot.parse(["runs/a"]).output == str(tmp_path / "runs/a/curves.png")
    assert plot.parse(["runs/a", "runs/b"]).output == str(tmp_path / "curves.png")
    assert plot.parse(["runs/a", "--output=x.png"]).output == str(tmp_path / "x.png")
    assert "RUN is missing" in error_of(capsys, plot.parse)
    with pytest.raises(SystemExit, match=r"(?s)error: 1 of the given folders.*no such folder"):
        plot.main(["a"])
