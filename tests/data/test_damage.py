"""Damaged datasets, foreign classes in their metadata, damaged archives: one clear error each."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from helpers import small_dataset

from cotnet_jax.commands import prepare as prepare_command
from cotnet_jax.data import digits, imagenet, pipeline, sources
from cotnet_jax.data.prepare import dataset, imagenet_listing, plan
from cotnet_jax.data.prepare.listing import SourceError
from cotnet_jax.data.undecodable import UndecodableError


def open_train(folder, split="train"):
    return sources.open_source(small_dataset.config_for(folder).data, split)


@pytest.fixture
def folder(tmp_path):
    return small_dataset.write(tmp_path / "data", [0, 1] * 6)


def shorter(path):
    other = small_dataset.write(path.parent.parent / "other", [0, 1] * 5)
    path.write_bytes(small_dataset.shard(other, 1, 2).read_bytes())


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:65536]), "damaged or truncated"),
    "one byte": (lambda path: path.write_bytes(b"x"), "damaged or truncated, 1 bytes"),
    "garbage": (lambda path: path.write_bytes(b"garbage" * 20_000), "damaged or truncated"),
    "shorter": (shorter, "has 5 records instead of 6"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_named_with_what_is_wrong_and_what_to_do(folder, name):
    damage, words = DAMAGE[name]
    path = small_dataset.shard(folder, 1, 2)
    damage(path)
    with pytest.raises(sources.DatasetError) as error:
        open_train(folder)
    for word in (f"1 of the 2 files in {folder}", str(path), words, "prepare it again"):
        assert word in str(error.value)
    # What the split does not need is not looked at.
    assert len(open_train(folder, "train[:6]")) == 6


def test_a_damaged_record_counts_as_an_undecodable_image(folder, caplog):
    path = small_dataset.shard(folder, 0, 2)
    data = bytearray(path.read_bytes())
    at = data.index(small_dataset.png(3)[-40:])
    data[at] ^= 0xFF
    path.write_bytes(data)
    config = small_dataset.config_for(folder)
    config.data.max_undecodable = 1 / 12
    batches = list(pipeline.eval_batches(config))
    assert sum(batch["mask"].sum() for batch in batches) == 12
    assert not batches[0]["image"][3].any()
    images = [next(pipeline.train_batches(config, start_step=0))["image"] for _ in range(2)]
    np.testing.assert_array_equal(*images)
    config.data.max_undecodable = 0.0
    with pytest.raises(UndecodableError, match=r"\[3\]"):
        list(pipeline.eval_batches(config))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("keep", [0, 1, 0.5, "[]", "null", "\0" * 100])
def test_torn_metadata_is_one_error_with_the_file(folder, file, keep):
    path = folder / file
    text = path.read_text()
    length = int(keep * len(text)) if isinstance(keep, float) else keep
    path.write_text(keep if isinstance(keep, str) else text[:length])
    with pytest.raises(sources.DatasetError, match=r"(?s)\.json: .*prepare it again"):
        open_train(folder)


def change_split(**fields):
    return lambda info: info["splits"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda info: info.update(splits=[]), "names no splits"),
        (lambda info: info.pop("name"), "Could not format template"),
        (lambda info: info.update(fileFormat="parquet"), "is damaged"),
        (change_split(filepathTemplate="{FOO}"), "Could not format template"),
        (change_split(shardLengths=["-1", "6"]), "a file of split 'train' has no records"),
        (change_split(shardLengths=["0", "6"]), "a file of split 'train' has no records"),
    ],
    ids=["no splits", "no name", "other format", "template", "negative", "zero"],
)
def test_wrong_metadata_is_one_error_with_the_file(folder, change, words):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    with pytest.raises(sources.DatasetError, match=rf"{path}: .*{words}.*prepare it again"):
        open_train(folder)


def test_a_split_without_images_is_said_to_be_one(folder):
    data = small_dataset.config_for(folder).data
    with pytest.raises(sources.DatasetError, match=r"'train\[:0\]' .* holds no images; .*train \("):
        sources.open_source(data, "train[:0]")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cat\n", "names 1 classes of 2"),
        (b"cat\ndog\nemu\n", "names 3 classes of 2"),
        (b"", "names 0 classes of 2"),
        (b"caf\xe9\ndog\n", "can't decode byte 0xe9"),
    ],
)
def test_damaged_names_of_classes_are_not_replaced_by_numbers(folder, content, words):
    path = folder / "label.labels.txt"
    path.write_bytes(content)
    with pytest.raises(sources.DatasetError, match=rf"{path}: .*{words}.*prepare it again"):
        open_train(folder)


def test_a_mark_before_the_names_of_classes_is_none_of_them(folder):
    path = folder / "label.labels.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert open_train(folder).class_names == ("cat", "dog")


def test_torn_metadata_of_the_digits(tmp_path):
    info = next(digits.builder(str(tmp_path)).data_path.glob("dataset_info.json"))
    info.write_text(info.read_text()[:100])
    with pytest.raises(sources.DatasetError, match=rf"{info}: .*delete {info.parent}"):
        digits.builder(str(tmp_path))


def test_prepare_does_not_call_a_damaged_dataset_finished(folder, tmp_path, capsys):
    (folder / "dataset_info.json").write_text("{")
    (tmp_path / "source").mkdir()
    arguments = ["folder", f"--source={tmp_path / 'source'}", f"--output={folder}"]
    assert prepare_command.main(arguments) == 1
    assert "error: " + str(folder / "dataset_info.json") in capsys.readouterr().err


EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"


def nested(feature):
    return {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": feature},
    }


@pytest.mark.parametrize(
    "feature",
    [
        {"pythonClassName": "evil.Feature", "text": {}},
        {"python_class_name": "evil.Feature", "text": {}},
        {"type": "evil.Feature", "content": {}},
        nested({"pythonClassName": "evil.Feature", "text": {}}),
        nested(nested({"type": "evil.Feature", "content": {}})),
        {"pythonClassName": "tensorflow_datasets.core.features.evil.Feature", "text": {}},
        {"pythonClassName": "tensorflow_datasets.core.features.feature_test.X", "text": {}},
    ],
    ids=["new", "snake case", "legacy", "nested", "nested twice", "unknown", "a test of TFDS"],
)
def test_features_of_others_are_not_imported(folder, monkeypatch, feature):
    (folder / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(folder))
    path = folder / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["extra"] = feature
    path.write_text(json.dumps(features))
    before = set(sys.modules)
    with pytest.raises(sources.DatasetError, match=r"features\.json: names the Python class '"):
        open_train(folder)
    # By name, too.
    named = folder.parent / "store" / "mine"
    named.mkdir(parents=True)
    folder.rename(named / "1.0.0")
    config = small_dataset.config_for("mine").data
    config.data_dir = str(named.parent)
    with pytest.raises(sources.DatasetError, match=r"features\.json: names the Python class '"):
        sources.open_source(config, "train")
    assert not (named / "1.0.0" / "ran").exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name or "test" in name}


def test_prepare_imports_no_features_of_others(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "evil.py").write_text(EVIL)
    (folder / "features.json").write_text('{"type": "evil.Feature", "content": {}}')
    with pytest.raises(SourceError, match="evil"):
        plan.find_tfrecord_copy(folder)
    assert not (folder / "ran").exists()


def test_features_without_images_or_classes_are_refused(folder):
    path = folder / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["label"] = {
        "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
        "text": {},
    }
    path.write_text(json.dumps(features))
    with pytest.raises(sources.DatasetError, match=r"'label' is Text.* needs ClassLabel"):
        open_train(folder)


WNIDS = imagenet.wnids()[:3]


def tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


INNER = [tar({f"{wnid}_{i}.JPEG": b"image" * 200 for i in range(3)}) for wnid in WNIDS]


class Serial:
    map = map


def list_train(tmp_path, inner, damage=lambda data: data):
    path = tmp_path / imagenet.TRAIN_TAR
    names = [f"{wnid}.tar" for wnid in WNIDS]
    path.write_bytes(damage(tar(dict(zip(names, inner, strict=True)))))
    return imagenet_listing.list_imagenet(tmp_path, Serial())


def test_whole_archives_are_listed(tmp_path):
    images = list_train(tmp_path, INNER).splits["train"]
    assert [(image.name, image.label) for image in images] == [
        (f"{wnid}_{i}.JPEG", label) for label, wnid in enumerate(WNIDS) for i in range(3)
    ]
    data = (tmp_path / imagenet.TRAIN_TAR).read_bytes()
    for image in images:
        assert data[image.offset : image.offset + image.size] == b"image" * 200


@pytest.mark.parametrize(
    "inner",
    [
        b"",
        b"garbage" * 999,
        bytes(10240),
        INNER[1][:4600],
        INNER[1].rstrip(b"\0").ljust(5120, b"\0")[:4608],
        INNER[1][:1536] + b"x" * 512 + INNER[1][2048:],
        b"\x1f\x8b" + INNER[1][2:],
    ],
    ids=["empty", "garbage", "zeros", "truncated", "no end", "torn header", "compressed"],
)
def test_a_damaged_inner_archive_is_an_error_that_names_it(tmp_path, inner):
    with pytest.raises(SourceError, match=f"member {WNIDS[1]}.tar .*download it again"):
        list_train(tmp_path, [INNER[0], inner, INNER[2]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>not found</html>" * 99,
        lambda data: data[: len(data) // 7],
        lambda data: data.rstrip(b"\0"),
        lambda data: data[:512] + b"x" * 512,
    ],
    ids=["empty", "no tar", "half", "no end", "garbage"],
)
@pytest.mark.parametrize("name", [imagenet.TRAIN_TAR, imagenet.VALIDATION_TAR])
def test_a_damaged_archive_is_an_error_that_names_it(tmp_path, damage, name):
    members = {f"{wnid}.tar": data for wnid, data in zip(WNIDS, INNER, strict=True)}
    if name == imagenet.VALIDATION_TAR:
        members = {imagenet.validation_name(n): b"image" for n in range(1, 4)}
    (tmp_path / name).write_bytes(damage(tar(members)))
    with pytest.raises(SourceError, match=f"{name} is not a whole, uncompressed tar file"):
        imagenet_listing.list_imagenet(tmp_path, Serial())


class TinyPlan:
    fingerprint = "f"
    leave_out = False
    short_side = 0

    def __init__(self, folder):
        self.incomplete = folder
        self.shards = [dataset.Shard(folder / f"s{i}", "train", i, 1) for i in range(4)]
        for shard in self.shards:
            shard.path.touch()


@pytest.mark.parametrize("torn", ['{"shard": "', "", "\0\0\0", "{}\n[1]\n", '{"shard": "other"}'])
def test_a_torn_progress_line_loses_nothing_else(tmp_path, torn):
    made = TinyPlan(tmp_path)
    path = tmp_path / "progress.jsonl"
    assert dataset._read_progress(made, check=True) == {}

    def finish(shard):
        dataset._end_line(path)
        with path.open("a") as file:
            result = {"num_bytes": 1, "reencoded": [], "undecodable": []}
            file.write(json.dumps({"shard": str(shard.path), **result}) + "\n")

    finish(made.shards[0])
    with path.open("a") as file:
        file.write(torn)
    finish(made.shards[1])
    finish(made.shards[2])
    assert list(dataset._read_progress(made, check=True)) == made.shards[:3]
