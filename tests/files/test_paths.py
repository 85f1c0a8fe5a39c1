"""Paths that users type: one function makes them absolute, wherever they enter."""

import json
import os
from pathlib import Path

import jax
import pytest

from configs import digits
from cotnet_jax import files
from cotnet_jax.checkpoint.checkpointer import Checkpointer
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.command_line import config_option
from cotnet_jax.commands import prepare, train
from cotnet_jax.config import expand_paths, find_problems
from cotnet_jax.data import class_names, real_labels, sources
from cotnet_jax.predictor import Predictor, find_images
from cotnet_jax.weights import convert, loading, read_weights


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder that is not the folder of the process."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/run", "{home}/run"),
        ("~", "{home}"),
        ("run", "{here}/run"),
        ("./~/run", "{here}/~/run"),
        ("a/~/b", "{here}/a/~/b"),
        ("../x/", "{here}/../x"),
        ("/a//b/", "/a/b"),
        ("$HOME/run", "{here}/$HOME/run"),
        (Path("~/run"), "{home}/run"),
        (b"~/run", "{home}/run"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("s3://bucket//a", "s3://bucket//a"),
        ("c:/x", "{here}/c:/x"),
    ],
)
def test_expand(home, given, expected):
    expanded = files.expand(given)
    assert expanded == expected.format(home=home, here=home.parent / "here")
    assert files.expand(expanded) == expanded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "empty"),
        ("~nobody-of-this-name/x", r"no user ~nobody-of-this-name; write \./~nobody"),
        ("a\0b", "NUL"),
        ("gs://bucket/run", "mounted file system, not a URL"),
    ],
)
def test_what_cannot_be_a_local_path(given, message):
    with pytest.raises(ValueError, match=message):
        files.local(given)


def test_the_workdir_is_one_folder(home):
    workdir = Workdir("~/run")
    assert {workdir.path, workdir.config.parent, workdir.checkpoints.parent} == {home / "run"}
    with Checkpointer("~/run/checkpoints") as checkpointer:
        assert str(checkpointer.directory) == str(workdir.checkpoints.resolve())
    assert os.listdir() == []


def test_all_paths_of_a_configuration(home):
    config = digits.get_config()
    config.init_from, config.data.data_dir, config.eval.real_labels = "~/w", "data", "~/real.json"
    config.data.name = "~/prepared"
    expanded = expand_paths(config)
    assert expanded.init_from == str(home / "w")
    assert expanded.data.data_dir == str(Path("data").absolute())
    assert expanded.eval.real_labels == str(home / "real.json")
    assert expanded.data.name == str(home / "prepared")
    assert config.data.name == "~/prepared"
    config.data.data_dir = "gs://tfds-data/datasets"
    assert expand_paths(config).data.data_dir == "gs://tfds-data/datasets"
    for name in ("digits", "synthetic", "imagenet2012", "mnist:3.0.1"):
        config.data.name = name
        Path("digits").mkdir(exist_ok=True)
        assert expand_paths(config).data.name == name
    config.data.name = "there"
    Path("there").mkdir()
    assert expand_paths(config).data.name == str(Path("there").absolute())
    config.data.name = "~nobody-of-this-name/x"
    with pytest.raises(ValueError, match=r"--config.data.name=~nobody.*no user"):
        expand_paths(config)


def test_options(home, monkeypatch, capsys):
    (home / "digits.py").write_text("from configs.digits import get_config")
    parser = train.make_parser()
    options = parser.parse_args(["--workdir=~/run", "--weights=~/w"])
    assert (options.workdir, options.weights) == (str(home / "run"), str(home / "w"))
    assert config_option.find("~/digits.py") == f"{home}/digits.py"
    args = prepare.parse(["folder", "--source=~/photos", "--output=prepared"])
    assert (args.source, args.output) == (home / "photos", Path("prepared").absolute())
    with pytest.raises(SystemExit):
        parser.parse_args(["--workdir=gs://bucket/run"])
    assert (
        "--workdir: gs://bucket/run: give a folder or file of a mounted" in capsys.readouterr().err
    )


def test_python_calls(home, monkeypatch):
    from PIL import Image

    (home / "images").mkdir()
    Image.new("RGB", (9, 9)).save(home / "images" / "a.png")
    found = find_images(["~/images", "~/images/a.png"])
    assert [path.as_posix() for path in found] == ["~/images/a.png"] * 2
    settings = {"image_size": 8, "crop": 1.0, "interpolation": "bicubic"}
    predictor = Predictor.__new__(Predictor)
    predictor.settings = settings
    assert predictor.prepare(found[0]).shape == (8, 8, 3)
    (home / "names.txt").write_text("cat\ndog\n")
    assert class_names.read_names("~/names.txt") == ("cat", "dog")
    (home / "real.json").write_text("[]")
    with pytest.raises(ValueError, match="it has 0 entries"):
        real_labels.read_real_labels("~/real.json")
    (home / "empty").mkdir()
    for function in (read_weights, loading.load):
        with pytest.raises(ValueError, match=rf"{home}/empty: neither a folder made by"):
            function("~/empty")
    (home / "w.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=rf"{home}/w.pth"):
        convert.convert_torch_file("~/w.pth", "~/converted")
    with pytest.raises(FileNotFoundError, match=rf"no file {home}/none"):
        convert.convert_torch_file("~/none", "~/converted")
    data = digits.get_config().data
    data.name = "~/empty"
    with pytest.raises(sources.DatasetError, match=rf"{home}/empty. holds no prepared dataset"):
        sources.open_source(data, "train")
    assert os.listdir() == []


def test_the_configuration_that_is_kept_has_absolute_paths(home):
    config = digits.get_config()
    config.data.data_dir = "~/data"
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    workdir = Workdir("~/run")
    workdir.write_run_metadata(config=expand_paths(config), params={}, mesh=mesh, class_names=())
    kept = json.loads((home / "run/config.json").read_text())
    assert kept["data"]["data_dir"] == str(home / "data")


def test_an_unknown_field_is_not_allowed_to_change():
    config = digits.get_config()
    config.resume.allow_changes = "epochs, schedule,all"
    assert not find_problems(config, 1)
    config.resume.allow_changes = "epoch"
    (problem,) = find_problems(config, 1)
    assert problem.startswith("--config.resume.allow_changes=epoch: no such field")


def test_the_users_cache_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "cotnet_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "cotnet_jax"
