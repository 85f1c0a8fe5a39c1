"""Evaluating a run or weights that say themselves how, into reports and tables."""

import csv
import json
import shutil

import pytest
from helpers.events import read_events
from helpers.small_network import create_small, short_digits_config

from cotnet_jax import config as configuration
from cotnet_jax.configs import default
from cotnet_jax.data import sources
from cotnet_jax.data.dataset_folder import DatasetError
from cotnet_jax.reports import evaluation
from cotnet_jax.training import evaluation_config, loop, setup
from cotnet_jax.training.evaluate import evaluate_only
from cotnet_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "create_model", create_small)
        yield


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """The workdir of a run with checkpoints of the steps 4, 8 and 12."""
    config = short_digits_config()
    # What a run started from is not what is evaluated.
    config.accept_classes, config.eval.batch_size = True, 6
    config.checkpoint.keep_best = 3
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config, workdir)
    return workdir


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(**given):
    return evaluation_config.evaluation_config(**given)


def test_a_workdir_says_all(run):
    config = config_of(workdir=run)
    saved, ours = (
        configuration.flatten(each)
        for each in (json.loads((run / "config.json").read_text()), json.loads(config.to_json()))
    )
    assert {name for name in ours if ours[name] != saved[name]} == {"accept_classes"}
    assert config.data.mean == short_digits_config().data.mean
    assert config_of(workdir=run, fields={"data.crop": 0.5}).data.crop == 0.5


def test_a_run_of_an_earlier_version_is_evaluated(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["eval"]["calibration_bins"]
    saved["eval"]["gone"] = 3
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = config_of(workdir=tmp_path)
    assert config.eval.calibration_bins == default.get_config().eval.calibration_bins
    assert "gone" not in config.eval and config.eval.batch_size == 6
    saved["epochs"], saved["data"]["name"] = "many", 3
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"(?s)config.json: .*epochs = 'many'.*data.name = 3"):
        config_of(workdir=tmp_path)


def test_a_checkpoint_says_what_its_run_does(run):
    config = config_of(weights=run / "checkpoints" / "8", kind="raw")
    assert config.init_from == str(run / "checkpoints" / "8") and config.init_kind == "raw"
    assert config.data.eval_split == "test[:12]"
    other = config_of(weights=run, data="digits")
    assert other.data.eval_split == "test"
    assert config_of(weights=run, data="digits", split="train").data.eval_split == "train"


def test_other_weights_say_their_model_and_how_images_are_prepared(monkeypatch, tmp_path):
    told = {"model.name": "cotnet101", "data.image_size": 320, "data.mean": [0.5, 0.5, 0.5]}
    monkeypatch.setattr(evaluation_config, "read_settings", lambda *_: told)
    config = config_of(weights="w", data="digits", fields={"data.image_size": 64})
    assert (config.model.name, config.data.image_size) == ("cotnet101", 64)
    assert config.data.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"w: these weights do not say .*--data=FOLDER"):
        config_of(weights="w")
    with pytest.raises(ValueError, match="give --workdir=DIR or --weights=PATH"):
        config_of()
    with pytest.raises(FileNotFoundError, match=r"no run in it \(no config.json\)"):
        config_of(workdir=tmp_path)


def test_a_dataset_without_such_a_split(monkeypatch):
    class Builder:
        data_dir = "/data"

        class info:
            splits = ("train", "val")

    monkeypatch.setattr(sources, "_builder", lambda *_: Builder)
    with pytest.raises(DatasetError, match=r"/data has neither .*--split=SPLIT: train, val"):
        sources.find_evaluation_split(default.get_config().data)
    Builder.info.splits = ("train",)
    assert sources.find_evaluation_split(default.get_config().data) == "train"


def test_a_report_of_a_run(run):
    metrics, folder = evaluation.evaluate(config_of(workdir=run), run)
    assert folder == run / "evaluations" / f"{best_step(run)}-digits-test_to12-ema"
    content = json.loads((folder / "report.json").read_text())
    assert content["images"] == 12 and content["dataset"] == "digits"
    assert content["metrics"]["top1"] == metrics["ema_top1"]
    assert content["metrics"]["raw_top1"] == metrics["raw_top1"]
    # As without a report.
    plain = evaluate_only(config_of(workdir=run), run)
    assert plain == {name: metrics[name] for name in plain}
    (line,) = (run / "evaluations" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["top1"] == metrics["ema_top1"]
    events = read_events(run / "tensorboard" / "evaluate-digits-test_to12")
    values = {v.tag: v.simple_value for event in events for v in event.summary.value}
    assert values["ema_ece"] == pytest.approx(metrics["ema_ece"])
    # The start of a run hides later steps.
    assert not any(event.HasField("session_log") for event in events)


def best_step(run):
    found = {
        step: values["ema_top1"]
        for step, values in read_metrics(run / "metrics.jsonl").items()
        if "ema_top1" in values
    }
    return max(found, key=lambda step: (found[step], step))


def test_a_report_elsewhere_leaves_the_run_alone(run, tmp_path):
    before = sorted(run.rglob("*"))
    config = config_of(workdir=run, kind="raw")
    metrics, folder = evaluation.evaluate(config, run, output=tmp_path / "here")
    assert folder == tmp_path / "here" and (folder / "report.html").is_file()
    assert "ema_top1" not in metrics and "raw_ece" in metrics
    assert sorted(run.rglob("*")) == before


def test_other_data_than_the_run_s_own(run):
    config = config_of(workdir=run, data="synthetic", split="validation[:8]")
    with pytest.raises(ValueError, match="the weights have 10 classes, but 'synthetic' has 1000"):
        evaluation.evaluate(config, run)
    assert not any(path.name.startswith("12-synth") for path in run.rglob("*"))


def test_many_checkpoints_make_one_table(run, tmp_path, monkeypatch):
    set_up, setups = evaluation.set_up_evaluation, []
    monkeypatch.setattr(
        evaluation,
        "set_up_evaluation",
        lambda config, **how: setups.append(config) or set_up(config, **how),
    )
    paths = evaluation.checkpoints_of(run)
    assert [path.name for path in paths] == ["4", "8", "12"]
    paths = paths[1:]
    configs = [config_of(weights=path) for path in paths]
    configs.append(config_of(weights=run / "checkpoints" / "12", kind="raw"))
    # Another setting in between, and weights that are not there.
    configs.insert(1, config_of(weights=paths[0], split="test[:5]"))
    configs.insert(2, config_of(weights=run / "checkpoints" / "9"))
    with pytest.raises(ValueError, match=r"(?s)^1 of 5 weights .* 9.*others are in .*csv"):
        evaluation.evaluate_each(configs, output=tmp_path / "tables")
    # The last three share one network and one set of workers.
    assert len(setups) == 3
    (path,) = (tmp_path / "tables").iterdir()
    assert path.name == "table-digits-test_to12.csv"
    rows = list(csv.DictReader(path.open()))
    assert [(row["step"], row["kind"], row["images"]) for row in rows] == [
        ("8", "ema", "12"),
        ("8", "ema", "5"),
        ("12", "ema", "12"),
        ("12", "raw", "12"),
    ]
    metrics = read_metrics(run / "metrics.jsonl")
    assert float(rows[2]["top1"]) == metrics[12]["ema_top1"]
    assert float(rows[3]["top5"]) == metrics[12]["raw_top5"]
    assert all(0 <= float(row["ece"]) <= 100 and float(row["seconds"]) >= 0 for row in rows)


def test_nothing_is_left_where_nothing_was_evaluated(run, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        evaluation.checkpoints_of(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x: Not a directory.*--output=DIR"):
        evaluation.evaluate(config_of(workdir=run), run, output=tmp_path / "file" / "x")
