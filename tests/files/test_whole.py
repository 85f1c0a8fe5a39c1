"""Files that are written whole, and what is left of those that were not."""

import os

import pytest

from cotnet_jax import files


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_whole(path, "old")
    synced = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or fsync(fd))

    def crash(*_):
        assert synced[-1] == 3
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", crash)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]
    monkeypatch.setattr(type(path), "replace", lambda self, target: replace(self, target))
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "c\n"), ("a\n", "a\nc\n"), ('a\n{"half', 'a\n{"half\nc\n'), ("\n", "\nc\n")],
)
def test_a_line_is_never_glued_to_a_torn_one(tmp_path, before, after):
    path = tmp_path / "lines"
    path.write_text(before)
    files.append_line(path, "c")
    assert path.read_text() == after


def test_only_leftovers_are_removed(tmp_path):
    (tmp_path / ".writing-1-config.json").write_text("")
    (tmp_path / ".writing-2").mkdir()
    (tmp_path / ".writing-2" / "file").write_text("")
    (tmp_path / ".probe-7").write_text("")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".writing-3").write_text("")
    (tmp_path / ".writing-link").symlink_to(tmp_path / "kept")
    removed = files.remove_leftovers(tmp_path, ".probe-*")
    assert len(removed) == 4
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == [".writing-3"]
    assert files.remove_leftovers(tmp_path / "nowhere") == []


def test_leftovers_of_one_entry_beside_those_of_others(tmp_path):
    """In a folder that several processes write to, each removes its own."""
    own, others = files.unfinished_name(tmp_path / "b[1]"), ("a-b[1]", "b[1]2", "b1")
    for path in (own, *(files.unfinished_name(tmp_path / name) for name in others)):
        path.write_text("")
    assert files.remove_leftovers(tmp_path, of="b[1]") == [own]
    assert len(os.listdir(tmp_path)) == 3
