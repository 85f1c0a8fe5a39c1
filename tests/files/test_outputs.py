"""What is made under a temporary name: by one process at a time, and cleared after a kill."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from cotnet_jax import files
from cotnet_jax.commands import prepare
from cotnet_jax.data import digits
from cotnet_jax.data.prepare import command
from cotnet_jax.files import FolderLock, LockedError, lock_file_beside
from cotnet_jax.weights import convert, torch_files
from cotnet_jax.weights.folder import NewFolder, WeightsError


def hold(path):
    """The lock of another one that makes this output."""
    return FolderLock(lock_file_beside(path), "another", "wait")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )
    for name in ("cat/a.png", "dog/b.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def run(photos, output):
    return prepare.main(["folder", f"--source={photos}", f"--output={output}", "--workers=1"])


def test_preparing_twice_at_once_is_one_line(photos, tmp_path, capsys):
    output = tmp_path / "prepared"
    with hold(output):
        assert run(photos, output) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: another process prepares {output}: process {os.getpid()}")
        assert len(error.splitlines()) == 1
        assert "choose another --output" in error
        assert not output.with_name("incomplete_prepared").exists()
    assert run(photos, output) == 0
    assert sorted(os.listdir(tmp_path)) == ["photos", "prepared"]
    # Nothing is written where all is there.
    with hold(output):
        assert run(photos, output) == 0


def test_a_killed_preparation_leaves_nothing(photos, tmp_path):
    left = tmp_path / "incomplete_prepared" / "writing_7_prepared-train.array_record-00000-of-00001"
    left.parent.mkdir()
    left.write_bytes(b"half")
    assert run(photos, tmp_path / "prepared") == 0
    names = os.listdir(tmp_path / "prepared")
    assert "dataset_info.json" in names
    assert not [name for name in names if "writing" in name]


def test_a_killed_first_use_of_the_digits_leaves_nothing(tmp_path):
    folder = tmp_path / "sklearn_digits" / ".writing-killed" / "part"
    folder.mkdir(parents=True)
    assert digits.builder(str(tmp_path)).is_prepared()
    assert os.listdir(tmp_path / "sklearn_digits") == ["1.0.0"]


def test_converting_twice_at_once_is_one_line(tmp_path):
    output = tmp_path / "weights"
    living = tmp_path / ".weights.7.partial"
    with NewFolder(output) as folder:
        assert folder.unfinished.is_dir()
        with pytest.raises(LockedError, match=r"weights is being written: process .*--output"):
            NewFolder(output).__enter__()
        assert folder.unfinished.is_dir()
    living.mkdir()
    other = tmp_path / ".weights2.7.partial"
    other.mkdir()
    with NewFolder(output) as folder:
        folder.publish()
    assert sorted(os.listdir(tmp_path)) == [".weights2.7.partial", "weights"]


def test_converting_back_is_locked_and_cleared_too(tmp_path):
    output = tmp_path / "w.safetensors"
    (tmp_path / ".w.safetensors.7.partial").write_bytes(b"half")
    with hold(output), pytest.raises(LockedError):
        convert.convert_to_torch(tmp_path, output)
    with pytest.raises(WeightsError, match="neither a folder"):
        convert.convert_to_torch(tmp_path, output)
    assert os.listdir(tmp_path) == []


def test_another_conversion_in_the_same_folder_is_left_alone(tmp_path):
    tensors = {"w": np.ones(3, np.float32)}
    with NewFolder(tmp_path / "first") as first:
        (first.unfinished / "weights").write_text("")
        with files.writing_whole(tmp_path / "first.safetensors") as unfinished:
            unfinished.write_text("half")
            with NewFolder(tmp_path / "second") as second:
                second.publish()
            torch_files.write_safetensors(tmp_path / "third.safetensors", tensors)
            assert unfinished.exists()
        first.publish()
    names = ["first", "first.safetensors", "second", "third.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
