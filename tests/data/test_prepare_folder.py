"""Folders of one's own images: a validation split, what is left out, a source that has changed."""

import hashlib
import io
import json
import os
import shlex
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import small_dataset
from helpers.preparing import ENCODED
from PIL import ExifTags, Image

from cotnet_jax.commands import prepare as prepare_command
from cotnet_jax.configs import default
from cotnet_jax.data import sources, transforms
from cotnet_jax.data.dataset_folder import open_folder
from cotnet_jax.data.prepare import command, dataset, plan
from cotnet_jax.data.prepare.report import FILE_NAME as REPORT


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Threads instead of processes, which take seconds to start."""
    monkeypatch.setattr(
        command, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )


def prepare(source, output, *options):
    arguments = ["folder", f"--source={source}", f"--output={output}", "--workers=2", *options]
    return prepare_command.main(arguments)


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:6], 16)
    path.write_bytes(small_dataset.png(seed) if data is None else data)


@pytest.fixture
def source(tmp_path):
    """Classes of 20, 7, 2 and 1 images."""
    for name, count in {"ant": 20, "bee": 7, "cat": 2, "dog": 1}.items():
        for number in range(count):
            put(tmp_path / "my images" / name / f"{number}.png")
    return tmp_path / "my images"


def images(output):
    """{split: {name: class}} of a prepared folder."""
    builder = open_folder(output)
    names = builder.info.features["label"].names
    return {
        split: {
            example["file_name"].decode(): names[example["label"]]
            for example in builder.as_data_source(split, decoders=ENCODED)
        }
        for split in builder.info.splits
    }


def read_report(output):
    return json.loads((output / REPORT).read_text())


def test_a_validation_split_has_its_share_of_each_class(source, tmp_path, capsys):
    assert prepare(source, tmp_path / "out", "--validation=0.2") == 0
    splits = images(tmp_path / "out")
    assert splits.keys() == {"train", "validation"}
    assert not splits["train"].keys() & splits["validation"].keys()
    counts = {split: Counter(found.values()) for split, found in splits.items()}
    assert counts["validation"] == {"ant": 4, "bee": 1, "cat": 1}
    assert counts["train"] == {"ant": 16, "bee": 6, "cat": 1, "dog": 1}
    assert read_report(tmp_path / "out")["splits"]["train"]["images_of_class"] == counts["train"]
    printed = capsys.readouterr().out
    assert "4 classes (ant, bee, cat, dog)" in printed
    assert "train: 24 images, 1 to 16 of a class" in printed
    assert "DIFFERS: validation: no images of 1 classes, the first dog" in printed


def test_an_image_is_in_the_same_split_every_time(source, tmp_path):
    prepare(source, tmp_path / "one", "--validation=0.2")
    shutil.move(source, tmp_path / "moved")
    # Other classes change nothing, and new images of a class little.
    shutil.rmtree(tmp_path / "moved" / "bee")
    put(tmp_path / "moved" / "eel" / "0.png")
    prepare(tmp_path / "moved", tmp_path / "two", "--validation=0.2")
    one, two = (images(tmp_path / name)["validation"] for name in ("one", "two"))
    assert {n for n in one if n.startswith("ant")} == {n for n in two if n.startswith("ant")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation=0"], "--validation: must be above 0 and below 1, not '0'"),
        (["--validation=20%"], "--validation: must be above 0 and below 1, not '20%'"),
        (["--layout=flat"], "--layout: must be classes|splits, not 'flat'"),
    ],
)
def test_what_cannot_be_split_off(source, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "out", *options)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare_command.main(["imagenet", "--source=a", "--output=b", "--validation=0.2"])
    assert "--validation: for folder only" in capsys.readouterr().err


def test_a_source_that_has_its_splits_keeps_them(tmp_path, capsys):
    for split in ("training", "val", "test"):
        for number in range(5):
            put(tmp_path / "in" / split / "ant" / f"{number}.png")
    assert prepare(tmp_path / "in", tmp_path / "out", "--validation=0.2") == 1
    message = capsys.readouterr().err
    assert "but the source has the splits test, train, validation; leave the option out" in message
    shutil.rmtree(tmp_path / "in" / "val")
    assert prepare(tmp_path / "in", tmp_path / "out", "--validation=0.2") == 0
    counts = {split: len(found) for split, found in images(tmp_path / "out").items()}
    assert counts == {"train": 4, "validation": 1, "test": 5}


def test_a_single_class_is_noticed(source, tmp_path, capsys):
    """The source may be one folder too high."""
    (tmp_path / "above").mkdir()
    inside = source.rename(tmp_path / "above" / "animals")
    assert prepare(tmp_path / "above", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "there is only one class, animals, and a classifier needs two; " in printed
    assert f"(ant, bee, ...) are the classes, type --source={inside}\n" in printed


def test_an_output_inside_the_source_is_refused(source, capsys):
    """It would be a class of the next dataset."""
    assert prepare(source, source / "out") == 1
    advice = (
        f"is inside the source, where it would be taken for a class; choose one outside {source}"
    )
    assert advice in capsys.readouterr().err
    assert not (source / "out").exists()


def test_folders_are_classes_unless_they_are_named_like_splits(tmp_path):
    for name in ("a", "b"):
        for year in ("2019", "2020"):
            put(tmp_path / "in" / name / year / "0.png")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert set(images(tmp_path / "out")["train"].values()) == {"a", "b"}
    assert prepare(tmp_path / "in", tmp_path / "splits", "--layout=splits") == 0
    assert images(tmp_path / "splits")["b"] == {"2019/0.png": "2019", "2020/0.png": "2020"}
    # A class of vehicles.
    (tmp_path / "in" / "a").rename(tmp_path / "in" / "train")
    assert prepare(tmp_path / "in", tmp_path / "classes", "--layout=classes") == 0
    assert set(images(tmp_path / "classes")["train"].values()) == {"b", "train"}


@pytest.mark.parametrize("shards", [1, 4])
def test_undecodable_images_are_left_out_and_listed(source, tmp_path, capsys, monkeypatch, shards):
    monkeypatch.setattr(
        plan.shard_utils.ShardConfig,
        "calculate_number_shards",
        classmethod(lambda cls, size, count: min(count, shards)),
    )
    put(source / "ant" / "text.jpg", b"no image")
    put(source / "ant" / "empty.jpg", b"")
    put(source / "bee" / "torn.png", (source / "bee" / "0.png").read_bytes()[:90])
    assert prepare(source, tmp_path / "out") == 0
    assert len(images(tmp_path / "out")["train"]) == 30
    split = read_report(tmp_path / "out")["splits"]["train"]
    left_out = {"ant/text.jpg", "ant/empty.jpg", "bee/torn.png"}
    assert {name for name, _ in split["left_out"]} == left_out
    assert (split["images"], split["undecodable"]) == (30, [])
    printed = capsys.readouterr().out
    assert "3 undecodable" in printed
    assert "left out, undecodable: ant/text.jpg: " in printed
    # Training and evaluation read it through.
    data = default.get_config().data
    data.name = str(tmp_path / "out")
    found = sources.open_source(data, "train")
    assert sorted({found[index]["label"] for index in range(len(found))}) == [0, 1, 2, 3]
    assert prepare(source, tmp_path / "all", "--no_check") == 0
    assert len(images(tmp_path / "all")["train"]) == 33


def test_a_split_without_an_image_is_an_error(tmp_path, capsys):
    put(tmp_path / "in" / "ant" / "0.png", b"no image")
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    assert "none of the 1 images of train can be decoded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rewrite(path, data):
    """Replace a file by one of the same size, and keep its time."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_source_that_has_changed_is_noticed(source, tmp_path, capsys):
    put(source / "ant" / "torn.png", b"no image")
    output = tmp_path / "out"

    def again(*options):
        code = prepare(source, output, "--validation=0.2", *options)
        printed = capsys.readouterr()
        return printed.err.partition("error: ")[2] if code else printed.out

    again()
    # Nothing has changed; nor has it in a copy, whose files are newer.
    assert "already there; nothing to do" in again()
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    (tmp_path / "copy").rename(source)
    assert "already there; nothing to do" in again()
    (output / REPORT).rename(tmp_path / "report")
    assert "new: 1 images, the first ant/torn.png" in again()
    (tmp_path / "report").rename(output / REPORT)

    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    data = bytearray((source / "bee" / "3.png").read_bytes())
    data[-20] ^= 1
    rewrite(source / "bee" / "3.png", bytes(data))
    assert "has changed since:\n  changed: 1 images, the first bee/3.png\n" in again()
    put(source / "ant" / "new.png")
    (source / "cat" / "1.png").unlink()
    message = again()
    assert message.startswith(f"{output} is already there, and {source} has changed since:\n")
    assert "\n  new: 1 images, the first ant/new.png\n" in message
    assert "\n  gone: 1 images, the first cat/1.png\n" in message
    assert "\n  changed: 1 images, the first bee/3.png\n" in message
    assert "delete that folder" in message
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    # What could not be decoded then, and can be now.
    shutil.copy(source / "ant" / "0.png", source / "ant" / "torn.png")
    assert "changed: 2 images, the first ant/torn.png, bee/3.png" in again()


def test_another_validation_split_is_noticed(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", "--validation=0.2")
    assert prepare(source, tmp_path / "out", "--validation=0.3") == 1
    assert "in another split: 3 images, the first ant/" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out") == 1


@pytest.mark.parametrize("options", [[], ["--validation=0.2"]])
def test_what_is_printed_can_be_pasted(source, tmp_path, capsys, options):
    output = tmp_path / "it's $HOME [1]"
    assert prepare(source, output, *options) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cotnet-train" in line]
    arguments = shlex.split(line)
    assert f"--config.data.name={output}" in arguments
    splits = [argument for argument in arguments if "_split=" in argument]
    expected = ["--config.data.train_split=train[:90%]", "--config.data.eval_split=train[90%:]"]
    assert splits == ([] if options else expected)


def stored(output):
    """{name: the file that is stored} of a prepared folder."""
    source = open_folder(output).as_data_source("train", decoders=ENCODED)
    return {example["file_name"].decode(): example["image"] for example in source}


def photo(size, file_format, **options):
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) % 200], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def test_images_are_resized_to_a_short_side(tmp_path, capsys):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files = {
        "wide.jpg": photo((120, 80), "JPEG", quality=95),
        "tall.png": photo((50, 101), "PNG"),
        "phone.jpg": photo((90, 60), "JPEG", exif=turned),
        "small.jpg": photo((60, 40), "JPEG"),
        "torn.jpg": photo((120, 80), "JPEG")[:300],
    }
    for name, data in files.items():
        put(tmp_path / "in" / "ant" / name, data)
    assert prepare(tmp_path / "in", tmp_path / "out", "--size=40") == 0
    found = stored(tmp_path / "out")
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in found.items()}
    assert sizes == {
        "ant/wide.jpg": (60, 40),
        "ant/tall.png": (40, 80),
        "ant/phone.jpg": (60, 40),
        "ant/small.jpg": (60, 40),
    }
    assert found["ant/small.jpg"] == files["small.jpg"]
    expected = transforms.resize(transforms.decode(files["wide.jpg"]), 40, 60, "bicubic")
    difference = transforms.decode(found["ant/wide.jpg"]) - np.asarray(expected, float)
    assert np.abs(difference).mean() < 2
    assert transforms.decode(found["ant/phone.jpg"], exif_orientation=True).shape == (60, 40, 3)
    split = read_report(tmp_path / "out")["splits"]["train"]
    assert (split["resized"], split["images"], len(split["left_out"])) == (3, 4, 1)
    assert "3 resized" in capsys.readouterr().out
    assert "short side of 40 pixels" in open_folder(tmp_path / "out").info.description


def test_another_size_is_noticed(source, tmp_path, capsys):
    output = tmp_path / "out"
    assert prepare(source, output, "--size=4") == 0
    capsys.readouterr()
    assert prepare(source, output, "--size=4") == 0
    assert "nothing to do" in capsys.readouterr().out
    for options in (["--size=20"], []):
        assert prepare(source, output, *options) == 1
        message = capsys.readouterr().err
        assert f"{output} is already there, prepared with --size=4: type the same" in message
    # The stored files are others, and the source's have not changed all the same.
    (output / REPORT).unlink()
    assert prepare(source, output, "--size=4") == 0
    assert prepare(source, output) == 1
    assert "changed: " in capsys.readouterr().err
    dataset_report = {"short_side": 4}
    (output / REPORT).write_text(json.dumps(dataset_report))
    assert prepare(source, output, "--size=4") == 0
    put(source / "bee" / "3.png", small_dataset.png(1))
    assert prepare(source, output, "--size=4") == 1
    assert "changed: 1 images, the first bee/3.png" in capsys.readouterr().err


def test_going_on_with_another_size_is_refused(source, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write", fails)
        assert prepare(source, tmp_path / "out", "--size=4") == 1
    capsys.readouterr()
    assert prepare(source, tmp_path / "out") == 1
    assert "begun with other images or options" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out", "--size=4") == 0
