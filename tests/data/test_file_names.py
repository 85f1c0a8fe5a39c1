"""Folders as they are on real disks: leftovers of programs, links, names that are not UTF-8."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import small_dataset

from configs import default
from cotnet_jax.commands import prepare as prepare_command
from cotnet_jax.data import class_names, file_names, imagenet, sources
from cotnet_jax.data.prepare import command, imagenet_listing, listing
from cotnet_jax.data.prepare.report import FILE_NAME as REPORT

LEFTOVERS = [
    ".ipynb_checkpoints/a.png",
    "__MACOSX/cat/a.png",
    "@eaDir/a.png",
    "lost+found/a.png",
    "$RECYCLE.BIN/a.png",
    ".thumbnails/a.png",
    "System Volume Information/a.png",
    "._0.png",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
]


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(
        command, "ProcessPoolExecutor", lambda workers, mp_context, **_: ThreadPoolExecutor(workers)
    )


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or small_dataset.png(len(str(path))))


def prepare(source, output, what="folder"):
    arguments = [what, f"--source={source}", f"--output={output}", "--workers=1"]
    return prepare_command.main(arguments)


def report(output):
    return json.loads((output / REPORT).read_text())


def open_train(output):
    data = default.get_config().data
    data.name = str(output)
    return sources.open_source(data, "train")


@pytest.mark.parametrize("layout", ["", "train/"])
def test_leftovers_are_no_classes_and_no_images(tmp_path, layout, capsys):
    source = tmp_path / "source"
    for name in ("cat", "dog"):
        put(source / layout / name / "0.png")
        put(source / layout / name / "IMG.JPEG")
        for leftover in LEFTOVERS:
            put(source / layout / name / leftover)
    for leftover in LEFTOVERS:
        put(source / leftover)
        put(source / layout / leftover)
    (source / layout / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / layout / "dog" / "pipe.png")
    put(source / layout / "loose.png")
    put(source / layout / "readme.txt")
    assert prepare(source, tmp_path / "out") == 0
    found = open_train(tmp_path / "out")
    assert (len(found), found.class_names) == (4, ("cat", "dog"))
    printed = capsys.readouterr().out
    lines = "\n".join(report(tmp_path / "out")["differences"])
    for words in (
        f"{2 * len(LEFTOVERS)} files and folders that systems and programs leave behind",
        "left out 1 links that lead nowhere, the first",
        "left out 1 entries that are neither files nor folders",
        "left out 1 images outside of folders of classes",
        "left out 1 files without an image's suffix",
    ):
        assert words in lines
        assert words in printed


@pytest.mark.parametrize("layout", ["", "train/"])
def test_folders_inside_a_class_are_of_the_class(tmp_path, layout):
    source = tmp_path / "source" / layout
    put(source / "cat" / "0.png")
    put(source / "cat" / "2019" / "0.png")
    put(source / "cat" / "2019" / "may" / "0.png")
    put(source / "cat" / "2019" / ".thumbnails" / "0.png")
    put(source / "dog" / "2019" / "0.png")
    (source / "dog" / "2019" / "again").symlink_to(source / "dog")
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    found = open_train(tmp_path / "out")
    names = {found[i]["file_name"]: found.class_names[found[i]["label"]] for i in range(len(found))}
    assert names == {
        "cat/0.png": "cat",
        "cat/2019/0.png": "cat",
        "cat/2019/may/0.png": "cat",
        "dog/2019/0.png": "dog",
    }
    lines = report(tmp_path / "out")["differences"]
    assert "left out 1 links to a folder that they are in" in "\n".join(lines)


@pytest.mark.parametrize("target", ["source", "source/train", "source/train/cat"])
def test_a_link_to_any_folder_above_is_a_circle(tmp_path, target):
    for name in ("cat", "dog"):
        put(tmp_path / "source" / "train" / name / "0.png")
    (tmp_path / "source" / "train" / "cat" / "all").symlink_to(tmp_path / target)
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    found = open_train(tmp_path / "out")
    assert {found[i]["file_name"] for i in range(len(found))} == {"cat/0.png", "dog/0.png"}
    (line,) = report(tmp_path / "out")["differences"]
    assert "left out 1 links to a folder that they are in" in line


def test_two_folders_of_one_split_are_an_error(tmp_path, capsys):
    for split in ("val", "valid"):
        put(tmp_path / "source" / split / "cat" / "0.png")
    assert prepare(tmp_path / "source", tmp_path / "out") == 1
    assert "several folders are of the same split (val, valid" in capsys.readouterr().err


ODD = {
    b"caf\xe9": r"caf\xe9",
    "caf\u00e9".encode(): "caf\u00e9",
    b"two\nlines": r"two\nlines",
    b"return\r": r"return\r",
    "para\u2029graph".encode(): r"para\u2029graph",
    b" spaces ": "spaces",
    "\u3000\u732b".encode(): "\u732b",
}


def test_odd_names_of_classes_and_files_are_kept_as_text(tmp_path, capsys):
    source = os.fsencode(tmp_path / "source")
    for name in ODD:
        folder = os.path.join(source, name)
        os.makedirs(folder)
        Path(os.fsdecode(os.path.join(folder, b"\xff\n0.png"))).write_bytes(small_dataset.png(0))
    put(tmp_path / "source" / "z" / os.fsdecode(b"\xe9.txt"))
    put(tmp_path / "source" / "z" / "0.png")
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    found = open_train(tmp_path / "out")
    assert found.class_names == tuple(sorted([*ODD.values(), "z"]))
    by_name = {found[i]["file_name"]: found[i]["label"] for i in range(len(found))}
    assert {name: found.class_names[label] for name, label in by_name.items()} == {
        "z/0.png": "z",
        **{rf"{name}/\xff\n0.png": name for name in ODD.values()},
    }
    assert r"\xe9.txt" in capsys.readouterr().out


def test_a_class_whose_accents_are_written_in_two_ways_is_one(tmp_path):
    """As macOS writes names, and as all others do."""
    put(tmp_path / "source" / "train" / "caf\u00e9" / "0.png")
    put(tmp_path / "source" / "val" / "cafe\u0301" / "0.png")
    for split in ("train", "val"):
        put(tmp_path / "source" / split / "tea" / "0.png")
    assert prepare(tmp_path / "source", tmp_path / "out") == 0
    assert open_train(tmp_path / "out").class_names == ("caf\u00e9", "tea")
    assert report(tmp_path / "out")["differences"] == []


@pytest.mark.parametrize(
    "names", [("cat", "cat "), (" ", "cat"), (b"\xe9", rb"\xe9"), ("\u00e9", "e\u0301")]
)
def test_classes_that_nothing_visible_tells_apart_are_an_error(tmp_path, names, capsys):
    for name in names:
        put(tmp_path / "source" / os.fsdecode(name) / "0.png")
    assert prepare(tmp_path / "source", tmp_path / "out") == 1
    assert "names of classes must differ" in capsys.readouterr().err


def test_an_output_that_is_not_utf_8_is_one_error(tmp_path, capsys):
    put(tmp_path / "source" / "cat" / "0.png")
    assert prepare(tmp_path / "source", tmp_path / os.fsdecode(b"\xe9")) == 1
    assert r"\xe9: its name is not UTF-8" in capsys.readouterr().err


def test_a_source_that_is_not_utf_8_works(tmp_path, capsys):
    source = tmp_path / os.fsdecode(b"\xe9")
    put(source / "cat" / "0.png")
    put(source / "cat" / "notes.txt")
    assert prepare(source, tmp_path / "out") == 0
    assert len(open_train(tmp_path / "out")) == 1


class Serial:
    map = map


def test_leftovers_and_odd_names_in_imagenets_archives(tmp_path):
    def tar(members):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(os.fsdecode(name))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return file.getvalue()

    wnid = imagenet.wnids()[0]
    inner = tar({b"\xff0.JPEG": b"image", b"._1.JPEG": b"junk", b".DS_Store": b"junk"})
    outer = {f"{wnid}.tar".encode(): inner, b"._" + wnid.encode() + b".tar": b"junk"}
    (tmp_path / imagenet.TRAIN_TAR).write_bytes(tar(outer))
    found = imagenet_listing.list_imagenet(tmp_path, Serial())
    (image,) = found.splits["train"]
    assert image.name == r"\xff0.JPEG"
    assert "left out 3 files and folders" in "\n".join(found.differences)


def test_a_leftover_folder_does_not_hide_flat_validation_images(tmp_path):
    put(tmp_path / "val" / imagenet.validation_name(1))
    put(tmp_path / "val" / ".ipynb_checkpoints" / "0.png")
    found = imagenet_listing.list_imagenet(tmp_path, Serial())
    assert [image.name for image in found.splits["validation"]] == [imagenet.validation_name(1)]
    assert "left out 1 files and folders" in "\n".join(found.differences)


def test_images_of_leftover_names_are_not_listed(tmp_path):
    for name in LEFTOVERS:
        put(tmp_path / name)
    images, others = listing.list_images(str(tmp_path))
    assert images == []
    assert len(others) == len(LEFTOVERS)


@pytest.mark.parametrize("name", ["a.jpg", "MACOSX", "thumbs.db.png", "lost", "eaDir", "~a.jpg"])
def test_ordinary_names_are_no_leftovers(name):
    assert not file_names.is_leftover(name)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"\xef\xbb\xbfcat\ndog\n", ("cat", "dog")),
        (b"cat\r\ndog\r\n\r\n", ("cat", "dog")),
        ("cat\u2028x\ndog\x0by\x85".encode(), ("cat\u2028x", "dog\x0by\x85")),
        (b"cat\n\ndog", ("cat", "", "dog")),
    ],
)
def test_files_of_class_names(tmp_path, data, names):
    (tmp_path / "classes.txt").write_bytes(data)
    assert class_names.read_names(tmp_path / "classes.txt") == names
