"""Resuming with what the run has not learned is refused, and its files stay as they are."""

import re
import shutil

import pytest
from helpers import small_dataset
from helpers.small_network import create_small, short_digits_config

from cotnet_jax.checkpoint.checkpointer import CheckpointError
from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError
from cotnet_jax.training import loop, setup

pytestmark = pytest.mark.end_to_end


def test_other_class_names_are_refused_and_nothing_is_overwritten(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(setup, "create_model", create_small)
    workdir, folder = Workdir(tmp_path / "run"), tmp_path / "mine"

    def train(class_names, *, epochs=1, **fields):
        config = small_dataset.config_for(folder)
        config.epochs, config.schedule.warmup_epochs, config.mixing.probability = epochs, 0, 0.0
        config.update(fields)
        folder.exists() and folder.rename(tmp_path / f"earlier {len(list(tmp_path.iterdir()))}")
        small_dataset.write(folder, [0, 1] * 2, class_names=class_names)
        return loop.train(config, workdir.path)

    train(("cat", "dog"))
    kept = {path: path.read_bytes() for path in workdir.path.iterdir() if path.is_file()}
    assert kept[workdir.classes] == b"cat\ndog\n"
    for names, words in (
        (("dog", "cat"), "another order: label 0 is 'cat' in the run, 'dog' in the dataset"),
        (("cat", "cow"), "only the run has 'dog'; only the dataset has 'cow'"),
        (("cat", "cow", "dog"), "only the dataset has 'cow'"),
    ):
        with pytest.raises(WorkdirError, match=words):
            train(names)
    assert {path: path.read_bytes() for path in kept} == kept
    # Without its configuration only the checkpoint can tell that the run is another one.
    workdir.config.unlink()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(("cat", "dog"), ema={"decay": 0.0})
    assert not workdir.config.exists()
    train(("cat", "dog"))
    train(("cat", "cow"), accept_classes=True)
    assert "classes differ, as accepted: only the run has 'dog'" in caplog.text
    assert workdir.classes.read_text() == "cat\ncow\n"


def test_a_dataset_that_has_grown_is_refused_and_can_be_allowed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(setup, "create_model", create_small)
    folder = tmp_path / "mine"

    def train(images, **fields):
        shutil.rmtree(folder, ignore_errors=True)
        small_dataset.write(folder, [0, 1] * (images // 2))
        config = small_dataset.config_for(folder)
        config.epochs, config.schedule.warmup_epochs, config.mixing.probability = 1, 0, 0.0
        config.resume.update(fields)
        return loop.train(config, tmp_path / "run")

    train(4)
    words = "--config.data.train_split: '4 images' there, '8 images' here"
    with pytest.raises(WorkdirError, match=re.escape(words)) as error:
        train(8)
    assert "--config.resume.allow_changes=data.train_split" in str(error.value)
    train(8, allow_changes="data.train_split")
    assert f"Changed since the last start: {words}" in caplog.text
    # What was allowed once is the run's now.
    train(8)
    with pytest.raises(WorkdirError, match="'8 images' there, '4 images' here"):
        train(4)


@pytest.mark.parametrize("line", ["{}", "[]", '{"images": "many"}', '{"images": nul', "\xff", ""])
def test_starts_that_do_not_tell_the_images_compare_none(tmp_path, line):
    workdir = Workdir(tmp_path)
    workdir.starts.write_bytes(line.encode("latin1"))
    workdir.check_resume(short_digits_config(), has_steps=True, images=5)
    workdir.starts.write_bytes(b'{"images": 4}\n' + line.encode("latin1"))
    if line != '{"images": "many"}':
        with pytest.raises(WorkdirError, match="'4 images' there"):
            workdir.check_resume(short_digits_config(), has_steps=True, images=5)
