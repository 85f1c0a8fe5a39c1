"""Weights for and from the Hub: a folder, its model card, and the calls of the client."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import golden, tiny_runs
from helpers.tiny_runs import CLASSES, equal, make_workdir

import cotnet_jax
from cotnet_jax import command_line, files
from cotnet_jax.commands import convert as convert_command
from cotnet_jax.commands import train
from cotnet_jax.version import __version__
from cotnet_jax.weights import Measurement, convert, loading, name_map
from cotnet_jax.weights.folder import NewFolder, WeightsError
from cotnet_jax.weights.hub import folder as hub_folder
from cotnet_jax.weights.torch_files import write_safetensors

NAMES = tuple(f"{index} |`é" for index in range(CLASSES))
START = {
    "command": ["/home/me/bin/cotnet-train", "--config=digits", "--workdir=/home/me/secret/run"],
    "devices": {"count": 2, "kind": "NVIDIA H100"},
    "versions": {"jax": "0.11.2", "cotnet_jax": "0.1.0", "pillow": "12"},
}
CONFIG = tiny_runs.CONFIG | {
    "data": tiny_runs.CONFIG["data"]
    | {"name": "/home/me/secret/flowers", "eval_split": "validation"}
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_workdir(tmp_path_factory.mktemp("runs") / "run", CONFIG, ((2, 61.25),))
    (path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (path / "starts.jsonl").write_text(json.dumps(START) + '\n{"torn')
    return path


@pytest.fixture(scope="module")
def exported(run):
    return cotnet_jax.export_for_hub(
        run, run.with_name("exported"), license="cc-by-4.0", repository="me/tiny", author="Me"
    )


@pytest.fixture
def torch_file(tmp_path):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=CLASSES)
    path = tmp_path / "x.safetensors"
    tensors = golden.state_dict(shapes, 3)
    write_safetensors(path, tensors)
    return path


def test_folder_loads_as_the_run_does(run, exported):
    first, second = loading.read_weights(run), loading.read_weights(exported)
    assert equal(first.variables, second.variables)
    assert second.class_names == NAMES
    for field in ("model", "kind", "settings", "attributes", "batches", "num_classes"):
        assert getattr(first, field) == getattr(second, field)
    assert second.source["format"] == "hub"
    predictor = cotnet_jax.Predictor.load(exported)
    assert predictor.names == NAMES and predictor.settings["image_size"] == 40
    assert equal(loading.read_weights(exported / "model.safetensors").variables, first.variables)
    with pytest.raises(WeightsError, match="has ema weights only, not raw"):
        loading.read_weights(exported, kind="raw")
    with pytest.raises(WeightsError, match="holds weights of cotnet_tiny, not of cotnet50"):
        loading.read_weights(exported, model="cotnet50")


def card_of(folder):
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_card_says_what_was_measured_and_by_whom(exported):
    metadata, text = card_of(exported)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["library_name"] == "cotnet_jax"
    assert metadata["pipeline_tag"] == "image-classification"
    assert {"image-classification", "cotnet_tiny"} <= set(metadata["tags"])
    assert metadata["metrics"] == ["accuracy"]
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "name": "top-1", "value": 61.25}]
    assert result["dataset"] == {"type": "flowers", "name": "flowers", "split": "validation"}
    assert "datasets" not in metadata, "a folder of one's own is nothing that others can get"
    for line in (
        "| top-1 | 61.25 % |",
        "- dataset: flowers, split `validation`",
        "- by: Me, the training run itself, at its step 2",
        "- command: `cotnet-train --config=digits --workdir=run`",
        "- device: 2 x NVIDIA H100",
        "- versions: cotnet_jax 0.1.0, jax 0.11.2",
        "| images | 40 x 40 pixels, RGB |",
        "| output_stride | 16 |",
        'cotnet_jax.load("hf-hub:me/tiny")',
        f"SHA-256 `{files.sha256(exported / 'model.safetensors')}`",
        f"cotnet_jax {__version__}",
        "0 \\|'é, ",
    ):
        assert line in text
    assert "secret" not in (text + (exported / "cotnet_hub.json").read_text())


def test_card_claims_nothing_that_was_not_measured(tmp_path, torch_file):
    folder = cotnet_jax.export_for_hub(torch_file, tmp_path / "tiny", license="mit")
    metadata, text = card_of(folder)
    assert not {"metrics", "model-index", "datasets"} & metadata.keys()
    assert "Not measured." in text and "%" not in text
    measured = Measurement(
        metrics={"top-1": 12.5},
        dataset="digits",
        split="test",
        by="A. Nonymous",
        command="cotnet-evaluate --config=digits --weights=x.safetensors",
    )
    folder = cotnet_jax.export_for_hub(
        torch_file, tmp_path / "b", license="mit", measured=measured, datasets=["imagenet-1k"]
    )
    metadata, text = card_of(folder)
    assert metadata["datasets"] == ["imagenet-1k"] and metadata["metrics"] == ["accuracy"]
    assert "| top-1 | 12.50 % |" in text and "- by: A. Nonymous\n" in text
    assert "- command: `cotnet-evaluate" in text


def test_the_published_accuracy_of_a_file_is_noted_as_not_measured(tmp_path, torch_file):
    read = loading.read_weights(torch_file)
    source = {**read.source, "epoch": 349, "metric": 81.3}
    with NewFolder(tmp_path / "converted") as new:
        default = cotnet_jax.create_model("cotnet_tiny").default_cfg
        description = {"model": "cotnet_tiny", "weights": "raw", "source": source}
        new.write(read.variables, {**description, "default_cfg": default, "num_batches_tracked": 1})
        new.publish()
    folder = cotnet_jax.export_for_hub(tmp_path / "converted", tmp_path / "hub", license="mit")
    metadata, text = card_of(folder)
    assert "metrics" not in metadata
    assert "notes epoch 349, metric 81.3, not how that was measured" in text


def test_what_a_card_cannot_say(tmp_path, torch_file):
    def export(**options):
        cotnet_jax.export_for_hub(torch_file, tmp_path / "a", license="mit", **options)

    with pytest.raises(TypeError, match=r"datasets must be a list, such as \['imagenet-1k'\]"):
        export(datasets="imagenet-1k")
    with pytest.raises(TypeError, match="measured must be a Measurement, not a dict"):
        export(measured={"top-1": 81.3})
    for value in ("81.3", float("nan")):
        with pytest.raises(ValueError, match="metrics: top-1 must be a finite number"):
            Measurement({"top-1": value}, dataset="d", split="test", by="me", command="x")
    assert not (tmp_path / "a").exists()


def test_nothing_is_left_of_what_fails(tmp_path, torch_file, monkeypatch):
    with pytest.raises(ValueError, match="license must be one line of text"):
        cotnet_jax.export_for_hub(torch_file, tmp_path / "a", license="")
    with pytest.raises(ValueError, match="no repository of the Hub; type hf-hub:OWNER/NAME"):
        cotnet_jax.export_for_hub(torch_file, tmp_path / "a", license="mit", repository="x")
    monkeypatch.setattr(
        loading.Weights, "torch_state_dict", lambda read: {"x": np.zeros(3, np.float32)}
    )
    with pytest.raises(ValueError):
        cotnet_jax.export_for_hub(torch_file, tmp_path / "a", license="mit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(WeightsError, match="full exists: delete it or choose another folder"):
        cotnet_jax.export_for_hub(torch_file, tmp_path / "full", license="mit")
    assert {path.name for path in tmp_path.iterdir()} == {torch_file.name, "full"}


@pytest.fixture
def changed(tmp_path, exported):
    """A copy of the folder, and a function that changes its JSON file."""
    for name in hub_folder.NEEDED:
        (tmp_path / name).write_bytes((exported / name).read_bytes())

    def change(**entries):
        file = tmp_path / "cotnet_hub.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return tmp_path

    return change


def test_a_folder_without_its_settings(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "cotnet_hub.json").unlink()
    with pytest.raises(WeightsError, match=r"nor a folder for the Hub \(no cotnet_hub.json\)"):
        cotnet_jax.load(copy)


def test_damage_is_noticed(tmp_path, changed):
    path = changed()
    tensors = path / "model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(WeightsError, match=r"model.safetensors: damaged, .*get it again"):
        loading.read_weights(path)
    # A checksum says nothing of who made it: what is hostile and consistent is looked at, too.
    tensors.write_bytes(b"\xff" * 7 + b"\x7f{" + bytes(100))
    with pytest.raises(ValueError, match="claims a header of"):
        loading.read_weights(changed(sha256=files.sha256(tensors)))
    tensors.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="a Git LFS pointer"):
        loading.read_weights(path)
    tensors.unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors, so it is"):
        loading.read_weights(path)


def test_settings_from_elsewhere_are_checked(changed):
    settings = {"image_size": 10**9, "crop": "x", "interpolation": [], "mean": [1, 2]}
    path = changed(
        model="../x\x1b[31m",
        kind="best",
        num_classes=True,
        settings=settings | {"x": 1},
        attributes={"output_stride": 7, "param_dtype": "int8"},
        class_names=["a", "b"],
        source=[],
    )
    with pytest.raises(WeightsError) as error:
        loading.read_weights(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path / 'cotnet_hub.json'}: 13 entries cannot be used:"
    assert "\x1b" not in str(error.value)
    assert "  settings.image_size: must be 1 or more, at most 4096, not 1000000000" in lines
    assert "  settings.std: must be three numbers above 0, not None" in lines
    assert "  attributes.param_dtype: unknown" in lines
    names = ["\x1b[31m", *NAMES[1:]]
    with pytest.raises(WeightsError, match=r"class_names\[0\]: must be one line of text"):
        loading.read_weights(changed(**good(), class_names=names))
    with pytest.raises(WeightsError, match=r"says raw weights of 10 classes, .* has ema"):
        loading.read_weights(changed(class_names=None, kind="raw"))
    with pytest.raises(WeightsError, match="this version reads 'cotnet_jax hub 1'"):
        loading.read_weights(changed(format="cotnet_jax hub 2"))
    (path / "cotnet_hub.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"cotnet_hub.json: the file is damaged"):
        loading.read_weights(path)


def good():
    """Entries that can be used."""
    return {
        "model": "cotnet_tiny",
        "kind": "ema",
        "num_classes": CLASSES,
        "settings": {key: CONFIG["data"][key] for key in loading._SETTINGS},
        "attributes": {},
        "source": {},
    }


class Client(types.ModuleType):
    """Takes the place of ``huggingface_hub``: its repositories are folders."""

    def __init__(self, folders):
        super().__init__("huggingface_hub")
        self.folders, self.calls = folders, []
        self.error = None

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        self.calls.append((repo_id, revision, allow_patterns))
        if self.error:
            raise self.error
        return str(self.folders[repo_id])

    def HfApi(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append((repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files_of = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append((files_of, commit_message))
        target = self.folders[repo_id]
        target.mkdir()
        for name, data in files_of.items():
            (target / name).write_bytes(data)


@pytest.fixture
def client(tmp_path, monkeypatch):
    client = Client({"me/tiny": tmp_path / "repository"})
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return client


def test_round_trip(run, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = cotnet_jax.push_to_hub(run, "me/tiny", license="mit", private=True)
    assert page == "https://huggingface.co/me/tiny"
    created, (uploaded, message) = client.calls
    assert created == ("me/tiny", True, True)
    assert sorted(uploaded) == ["README.md", "cotnet_hub.json", "model.safetensors"]
    assert message == f"Upload weights with cotnet_jax {__version__}"
    assert "- by: me, the training run itself" in uploaded["README.md"].decode()

    client.calls.clear()
    model, variables = cotnet_jax.load("hf-hub:me/tiny@v1.0")
    assert client.calls == [("me/tiny", "v1.0", ["cotnet_hub.json", "model.safetensors"])]
    assert model.output_stride == 16
    assert equal(variables, loading.read_weights(run).variables)
    assert cotnet_jax.Predictor.load("hf-hub:me/tiny").names == NAMES
    notes = loading.read_weights("hf-hub:me/tiny").notes
    assert notes[0].startswith("hf-hub:me/tiny: ema weights of cotnet_tiny, 10 classes")


def test_commands_take_it(run, exported, client, tmp_path, capsys, monkeypatch):
    client.folders["me/tiny"] = exported
    # Every command adds the option by the same function; a configuration has a field for it.
    parser = command_line.Parser("", ())
    command_line.add_weights(parser, "")
    assert parser.parse_args(["--weights=hf-hub:me/tiny"]).weights == "hf-hub:me/tiny"
    options = train.parse(["--config=digits", "--workdir=run", "--weights=hf-hub:me/tiny@main"])
    assert options.config.init_from == "hf-hub:me/tiny@main"
    for wrong in ("hf-hub:tiny", "hf-hub:me/../x", "hf-hub:me/tiny@"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--weights={wrong}"])
        assert "type hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REV" in capsys.readouterr().err
    # Other tests convert with the forward pass, which takes seconds to compile.
    monkeypatch.setattr(convert, "_compile_forward_pass", lambda *_: lambda _: np.zeros(1))
    arguments = ["--weights=hf-hub:me/tiny", f"--output={tmp_path / 'converted'}"]
    convert_command.main(arguments)
    first, second = loading.read_weights(run), loading.read_weights(tmp_path / "converted")
    assert equal(first.variables, second.variables)
    assert (second.class_names, second.settings) == (NAMES, first.settings)
    assert second.attributes == {"output_stride": 16}
    convert.convert_to_torch("hf-hub:me/tiny", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "no such repository, or it is private.*`hf auth login`"),
        ("GatedRepoError", "its owner gives access on request"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "not in the cache, and the Hub cannot be reached"),
        ("SomethingNew", "SomethingNew: first line$"),
    ],
)
def test_errors_of_the_client_are_one_line(client, name, message):
    client.error = type(name, (OSError,), {})("first line\nsecond line")
    with pytest.raises(WeightsError, match=f"hf-hub:me/tiny: .*{message}"):
        cotnet_jax.load("hf-hub:me/tiny")


def test_repository_of_something_else(client, tmp_path):
    client.folders["me/tiny"] = tmp_path
    with pytest.raises(WeightsError, match=r"has no cotnet_hub\.json and no model\.safetensors"):
        cotnet_jax.load("hf-hub:me/tiny")


def test_without_the_client(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    wanted = 'hf-hub:me/tiny: .*type pip install "huggingface-hub"'
    with pytest.raises(WeightsError, match=wanted):
        cotnet_jax.load("hf-hub:me/tiny")
    with pytest.raises(WeightsError, match=wanted):
        cotnet_jax.push_to_hub(run, "me/tiny", license="mit")


def test_cache_of_the_real_client_offline(exported, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in hub_folder.NEEDED:
        (snapshot / name).write_bytes((exported / name).read_bytes())
    original = hub.snapshot_download
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *args, **options: original(
            *args, cache_dir=tmp_path, local_files_only=True, **options
        ),
    )
    assert equal(
        loading.read_weights("hf-hub:me/tiny").variables,
        loading.read_weights(exported).variables,
    )
    with pytest.raises(WeightsError, match="not in the cache"):
        loading.read_weights("hf-hub:me/other")
