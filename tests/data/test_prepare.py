"""ImageNet and image folders become TFDS datasets; interruptions and errors on the way."""

import hashlib
import io
import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as futures_wait

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.preparing import ENCODED, RAW, dataset_dir
from PIL import Image

from configs import default
from cotnet_jax.commands import prepare as prepare_command
from cotnet_jax.data import imagenet, pipeline, sources, transforms
from cotnet_jax.data.prepare import checksums, command, dataset, listing, plan, shards
from cotnet_jax.data.prepare.report import FILE_NAME as REPORT
from cotnet_jax.tools import make_fake_imagenet


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what is in it): 20 classes, 100 training and 30 validation images."""
    folder = tmp_path_factory.mktemp("made")
    return folder, make_fake_imagenet.make(folder, 20, 5, 30, mean_size=(60, 80))


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Threads instead of processes, which take seconds to start."""
    monkeypatch.setattr(
        command, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )


def run(*arguments):
    return prepare_command.main([str(argument) for argument in arguments])


def prepare(source, output, *options, what="imagenet"):
    return run(what, f"--source={source}", f"--output={output}", "--workers=2", *options)


@pytest.fixture(scope="module")
def from_tars(made, tmp_path_factory):
    output = tmp_path_factory.mktemp("from_tars")
    # The one run with real processes.
    assert prepare(made[0] / "tars", output) == 0
    return output


def records(folder):
    """Serialized examples of every split of a prepared dataset."""
    builder = tfds.builder_from_directory(folder)
    return {
        split: list(builder.as_data_source(split, deserialize_method=RAW))
        for split in builder.info.splits
    }


def flatten_validation(source, target):
    shutil.copytree(source, target)
    for path in list((target / "val").glob("*/*")):
        path.rename(target / "val" / path.name)
    for path in (target / "val").iterdir():
        if path.is_dir():
            path.rmdir()


@pytest.mark.parametrize("layout", ["class folders", "flat validation"])
def test_folders_give_the_records_of_the_tars(made, from_tars, tmp_path, layout):
    source = made[0] / "folders"
    if layout == "flat validation":
        flatten_validation(source, tmp_path / "flat")
        source = tmp_path / "flat"
    assert prepare(source, tmp_path / "out") == 0
    assert records(dataset_dir(tmp_path / "out")) == records(dataset_dir(from_tars))


def test_tfds_reads_it_by_name(made, from_tars):
    for split in ("train", "validation"):
        source = tfds.data_source("imagenet2012", data_dir=from_tars, split=split, decoders=ENCODED)
        names = imagenet.wnids()
        found = {example["file_name"].decode(): names[example["label"]] for example in source}
        assert found == made[1][split]
        assert len(source) == len(found)
    decoded = tfds.data_source("imagenet2012", data_dir=from_tars, split="train")
    assert decoded[0]["image"].ndim == 3


def test_images_are_stored_as_they_were_but_for_cmyk_and_png(made, from_tars):
    odd = {name: kind for kind, name in made[1]["odd"].items()}
    originals = {path.name: path.read_bytes() for path in made[0].rglob("*.JPEG")}
    source = tfds.data_source("imagenet2012", data_dir=from_tars, split="train", decoders=ENCODED)
    for example in source:
        name, data = example["file_name"].decode(), example["image"]
        if odd.get(name) in ("CMYK", "PNG"):
            before = np.array(Image.open(io.BytesIO(originals[name])).convert("RGB"), int)
            assert np.abs(transforms.decode(data) - before).mean() < 1
            assert data[:2] == b"\xff\xd8"
        else:
            assert data == originals[name]


def test_order_is_tfds_order(from_tars):
    source = tfds.data_source("imagenet2012", data_dir=from_tars, split="train", decoders=ENCODED)
    names = [example["file_name"] for example in source]
    # TFDS sorts by the MD5 of the split's name and the key.
    assert names == sorted(names, key=lambda name: hashlib.md5(b"train" + name).digest())


def test_report(made, from_tars):
    report = json.loads((dataset_dir(from_tars) / REPORT).read_text())
    odd = made[1]["odd"]
    train = report["splits"]["train"]
    assert (train["images"], report["splits"]["validation"]["images"]) == (100, 30)
    assert train["reencoded"] == sorted([odd["CMYK"], odd["PNG"]])
    source = tfds.data_source("imagenet2012", data_dir=from_tars, split="train", decoders=ENCODED)
    undecodable = {name: index for index, name, _ in train["undecodable"]}
    assert set(undecodable) == {odd[kind] for kind in make_fake_imagenet.UNDECODABLE_KINDS}
    for name, index in undecodable.items():
        assert source[index]["file_name"].decode() == name
    differences = "\n".join(report["differences"])
    for words in ("100 images, the official set has 1,281,167", "980 classes", "img_val.tar"):
        assert words in differences


def imagenet_config(output):
    config = default.get_config()
    config.data.data_dir = str(output)
    config.data.image_size = 32
    config.data.num_workers, config.data.num_threads = 0, 2
    config.data.max_undecodable = 0.02
    config.batch_size, config.eval.batch_size = 20, 8
    return config


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_this_project_reads_it(made, from_tars, process_count):
    config = imagenet_config(from_tars)
    config.data.eval_split = "train"
    shares = [
        list(pipeline.eval_batches(config, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    labels = np.concatenate(
        [batch["label"][batch["mask"] == 1] for share in shares for batch in share]
    )
    assert len(labels) == 100
    np.testing.assert_array_equal(np.bincount(labels, minlength=20), [5] * 20)
    batches = pipeline.train_batches(config, start_step=0)
    epoch = [next(batches) for _ in range(pipeline.steps_per_epoch(config))]
    batches.close()
    assert sum(len(batch["label"]) for batch in epoch) == 100


def number_of(element):
    return np.int64(imagenet.validation_number(element["file_name"]) if element else 0)


def test_validation_images_have_their_official_numbers(made, from_tars):
    config = imagenet_config(from_tars)
    found = {}
    for batch in pipeline.eval_batches(config, example_fields={"number": number_of}):
        counted = batch["mask"] == 1
        assert not batch["number"][~counted].any()
        found |= dict(zip(batch["number"][counted], batch["label"][counted], strict=True))
    wnids = imagenet.wnids()
    expected = {int(name[15:23]): wnids.index(wnid) for name, wnid in made[1]["validation"].items()}
    assert found == expected


def write_tfrecords(source, target):
    """The prepared dataset as TFDS would have written it in TFRecord, two files a split."""
    target.mkdir(parents=True)
    builder = tfds.builder_from_directory(source)
    infos = []
    for split, found in records(source).items():
        parts = [found[: len(found) // 3], found[len(found) // 3 :]]
        for index, part in enumerate(parts):
            path = target / f"imagenet2012-{split}.tfrecord-{index:05d}-of-00002"
            # The checksums between the fields are not looked at.
            frames = [struct.pack("<QI", len(r), 0) + r + struct.pack("<I", 0) for r in part]
            path.write_bytes(b"".join(frames))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part) for part in parts],
                num_bytes=0,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=target,
                    dataset_name="imagenet2012",
                    split=split,
                    filetype_suffix="tfrecord",
                ),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=builder.info.features,
        version="5.1.0",
        split_infos=infos,
        check_data=False,
    )


def test_a_tfrecord_copy_gives_the_same_records(made, from_tars, tmp_path):
    source = tmp_path / "tfrecord"
    write_tfrecords(dataset_dir(from_tars), source / "imagenet2012" / "5.1.0")
    with pytest.raises(sources.DatasetError, match=r"not in the ArrayRecord format(.|\n)*prepare"):
        sources.open_source(imagenet_config(source).data, "train")
    assert prepare(source, tmp_path / "out") == 0
    assert records(dataset_dir(tmp_path / "out")) == records(dataset_dir(from_tars))
    report = json.loads((dataset_dir(tmp_path / "out") / REPORT).read_text())
    assert len(report["splits"]["train"]["undecodable"]) == 2
    assert report["splits"]["train"]["shards"] == 2
    source = tfds.data_source("imagenet2012", data_dir=tmp_path / "out", split="train")
    assert len(source) == 100


def test_resized_from_tars_and_from_a_tfrecord_copy_it_is_the_same(
    made, from_tars, tmp_path, capsys
):
    write_tfrecords(dataset_dir(from_tars), tmp_path / "tfrecord" / "imagenet2012" / "5.1.0")
    for source, output in ((made[0] / "tars", "small"), (tmp_path / "tfrecord", "copy")):
        assert prepare(source, tmp_path / output, "--size=32", "--no_checksum") == 0
    small, copy = (dataset_dir(tmp_path / output) for output in ("small", "copy"))
    report = json.loads((small / REPORT).read_text())["splits"]
    undecodable = {name for _, name, _ in report["train"]["undecodable"]}
    assert len(undecodable) == 2
    for split, stored in {split: images_of(small, split) for split in report}.items():
        copied = images_of(copy, split)
        assert stored.keys() == copied.keys()
        for name in stored.keys() - undecodable:
            image = Image.open(io.BytesIO(stored[name]))
            assert (image.mode, image.format) in (("RGB", "JPEG"), ("L", "JPEG"))
            assert min(image.size) <= 32
            # CMYK and PNG were JPEG already in what the copy was made of.
            assert Image.open(io.BytesIO(copied[name])).size == image.size
    assert report["train"]["resized"] > 90
    capsys.readouterr()
    assert prepare(made[0] / "tars", tmp_path / "small") == 1
    assert "prepared with --size=32" in capsys.readouterr().err


def images_of(folder, split):
    """{name: the file that is stored} of a split."""
    source = tfds.builder_from_directory(folder).as_data_source(split, decoders=ENCODED)
    return {example["file_name"].decode(): example["image"] for example in source}


def test_a_truncated_tfrecord_is_an_error(from_tars, tmp_path, capsys):
    source = tmp_path / "tfrecord"
    write_tfrecords(dataset_dir(from_tars), source)
    path = source / "imagenet2012-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-10])
    assert prepare(source, tmp_path / "out") == 1
    assert path.name in capsys.readouterr().err
    assert not dataset_dir(tmp_path / "out").exists()


def test_prepared_again_does_nothing(made, from_tars, capsys):
    folder = dataset_dir(from_tars)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(made[0] / "tars", from_tars) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(
        plan.shard_utils.ShardConfig,
        "calculate_number_shards",
        classmethod(lambda cls, size, count: min(count, 10)),
    )


def test_an_interrupted_run_goes_on(made, from_tars, tmp_path, monkeypatch, many_shards, capsys):
    calls = []

    def write_some(shard, *options):
        calls.append(shard.path.name)
        if len(calls) == 8:
            shard.path.with_name("writing_" + shard.path.name).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(shard.path))
        return shards.write(shard, *options)

    monkeypatch.setattr(dataset, "write", write_some)
    assert prepare(made[0] / "tars", tmp_path, "--workers=1") == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "run the command again" in message
    assert not dataset_dir(tmp_path).exists()
    first_seven = calls[:7]
    assert prepare(made[0] / "tars", tmp_path, "--workers=1") == 0
    assert not set(first_seven) & set(calls[8:])
    assert records(dataset_dir(tmp_path)) == records(dataset_dir(from_tars))
    report, whole = (
        json.loads((dataset_dir(output) / REPORT).read_text())["splits"]["train"]
        for output in (tmp_path, from_tars)
    )
    assert report | {"shards": 1} == whole
    assert not list(dataset_dir(tmp_path).glob("writing_*"))


def test_shards_finished_before_a_failure_are_recorded(
    made, tmp_path, monkeypatch, many_shards, capsys
):
    written = []

    def write_or_fail(shard, *options):
        written.append(shard.path.name)
        if len(written) == 5:
            raise OSError("stop")
        return shards.write(shard, *options)

    def failure_first(futures):
        # The order of futures that are finished when as_completed looks is arbitrary.
        futures_wait(futures, return_when="FIRST_EXCEPTION")
        return sorted(futures, key=lambda future: not (future.done() and future.exception()))

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write", write_or_fail)
        patch.setattr(dataset, "as_completed", failure_first)
        assert prepare(made[0] / "tars", tmp_path, "--workers=1") == 1
    assert "stop" in capsys.readouterr().err
    progress = dataset_dir(tmp_path).with_name("incomplete_5.1.0") / "progress.jsonl"
    recorded = {json.loads(line)["shard"] for line in progress.read_text().splitlines()[1:]}
    assert recorded >= set(written[:4])


def test_going_on_with_other_images_is_refused(made, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write", fails)
        assert prepare(made[0] / "tars", tmp_path / "out") == 1
    shutil.copytree(made[0] / "folders", tmp_path / "fewer")
    next((tmp_path / "fewer").rglob("*.JPEG")).unlink()
    capsys.readouterr()
    assert prepare(tmp_path / "fewer", tmp_path / "out") == 1
    assert "begun with other images" in capsys.readouterr().err


def test_a_full_disk_is_seen_before_writing(made, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage)
    assert prepare(made[0] / "tars", tmp_path) == 1
    assert "make room" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*array_record*"))


def test_checksums(made, tmp_path, monkeypatch):
    official = {}
    for path in (made[0] / "tars").iterdir():
        data = path.read_bytes()
        official[path.name] = (len(data), hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(imagenet, "checksums", lambda: official)
    archives = sorted((made[0] / "tars").iterdir())
    assert checksums.compare_checksums(archives) == []
    name = imagenet.TRAIN_TAR
    official[name] = (official[name][0], "0" * 64)
    (difference,) = checksums.compare_checksums(archives)
    assert name in difference
    assert "SHA-256" in difference


def test_official_checksums_are_those_of_tfds():
    official = imagenet.checksums()
    assert official[imagenet.TRAIN_TAR][0] == 147_897_477_120
    assert official[imagenet.VALIDATION_TAR][0] == 6_744_924_160
    assert {len(digest) for _, digest in official.values()} == {64}


def test_official_shard_numbers():
    number = plan.shard_utils.ShardConfig.calculate_number_shards
    assert number(147_000_000_000, 1_281_167) == 1024
    assert number(6_700_000_000, 50_000) == 64


def put(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8) if image is None else image).save(path)


def test_source_problems_are_one_clear_error(made, tmp_path, capsys):
    def fails(source, *words, what="imagenet"):
        assert prepare(source, tmp_path / "out", what=what) == 1
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        for word in words:
            assert word in message

    fails(tmp_path / "nothing", "no such folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", imagenet.TRAIN_TAR, "val/WNID")
    fails(tmp_path / "empty", "no folders", what="folder")
    put(tmp_path / "unknown" / "train" / "cats" / "a.png")
    fails(tmp_path / "unknown", "1 classes that are not", "cats", "prepare folder")
    put(tmp_path / "strange" / "val" / "a.png")
    fails(tmp_path / "strange", "ILSVRC2012_val_00000001.JPEG", "a.png")
    for wnid in imagenet.wnids()[:2]:
        put(tmp_path / "twice" / "train" / wnid / "a.png")
    fails(tmp_path / "twice", "several classes", "a.png")
    put(tmp_path / "mixed" / "cats" / "a.png")
    put(tmp_path / "mixed" / "train" / "cats" / "a.png")
    fails(tmp_path / "mixed", "two layouts", what="folder")
    (tmp_path / "none" / "cats").mkdir(parents=True)
    (tmp_path / "none" / "cats" / "readme.txt").write_text("none")
    fails(tmp_path / "none", "no images", what="folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    fails(tmp_path / "mixed" / "train", "not empty", what="folder")


def test_every_image_suffix_is_listed(tmp_path):
    names = [f"a{suffix}" for suffix in transforms.IMAGE_SUFFIXES]
    names += [f"b{suffix.upper()}" for suffix in transforms.IMAGE_SUFFIXES]
    for name in [*names, "notes.txt", "jpg"]:
        (tmp_path / name).write_bytes(b"")
    images, others = listing.list_images(str(tmp_path))
    assert sorted(image.name for image in images) == sorted(names)
    assert [path for path, _ in others] == [str(tmp_path / "jpg"), str(tmp_path / "notes.txt")]


def test_wrong_validation_folder_is_reported(made, tmp_path):
    shutil.copytree(made[0] / "folders", tmp_path / "source")
    path = next((tmp_path / "source" / "val").glob("*/*"))
    wrong = next(w for w in imagenet.wnids()[:20] if w != path.parent.name)
    put(tmp_path / "source" / "val" / wrong / "x.png")
    path.rename(tmp_path / "source" / "val" / wrong / path.name)
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    report = (dataset_dir(tmp_path / "out") / REPORT).read_text()
    expected = "1 images are in another class's folder than in the official set, the first "
    assert expected + path.name in report


@pytest.mark.parametrize("output", ["My Flowers", "flowers/2.0.0", "102flowers"])
def test_folder_of_class_folders(tmp_path, output, capsys):
    random = np.random.RandomState(0)
    for name in ("tulip", "rose"):
        for number in range(6):
            image = random.randint(0, 256, (9, 8, 3), np.uint8)
            put(tmp_path / "source" / name / f"{number}.png", image)
    (tmp_path / "source" / "rose" / "notes.txt").write_text("red")
    assert prepare(tmp_path / "source", tmp_path / output, what="folder") == 0
    printed = capsys.readouterr().out
    assert f"--config.data.name={tmp_path / output}" in printed
    assert "train[:90%]" in printed
    assert "left out 1 files" in printed
    config = default.get_config().data
    config.name = str(tmp_path / output)
    source = sources.open_source(config, "train")
    assert (len(source), list(source.class_names)) == (12, ["rose", "tulip"])
    originals = {
        path.read_bytes(): path.parent.name for path in (tmp_path / "source").rglob("*.png")
    }
    found = {source[i]["image"]: source.class_names[source[i]["label"]] for i in range(12)}
    assert found == originals
    parts = [len(sources.open_source(config, f"train[{part}]")) for part in (":90%", "90%:")]
    assert sum(parts) == 12


def test_folder_of_splits(tmp_path):
    for split, names in {"train": "abc", "val": "ab", "test": "c"}.items():
        for name in names:
            put(tmp_path / "source" / split / name / "1.jpg")
    assert prepare(tmp_path / "source", tmp_path / "out", what="folder") == 0
    config = default.get_config().data
    config.name = str(tmp_path / "out")
    lengths = {}
    for split in ("train", "validation", "test"):
        source = sources.open_source(config, split)
        assert source.num_classes == 3
        lengths[split] = len(source)
    assert lengths == {"train": 3, "validation": 2, "test": 1}
    assert sources.open_source(config, "test")[0]["label"] == 2
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert "validation: no images of 1 classes, the first c" in report["differences"]
