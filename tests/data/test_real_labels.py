"""ReaL labels: read, matched to images by name, and counted."""

import json
import random
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from cotnet_jax.data.imagenet import validation_number
from cotnet_jax.data.real_labels import read_real_labels
from cotnet_jax.distributed.watchdog import Watchdog
from cotnet_jax.training import evaluate, setup
from cotnet_jax.training.metrics import real_label_counts


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the published format, and its lists: none to four classes an image."""
    drawn = random.Random(0)
    lists = [drawn.sample(range(1000), drawn.randrange(5)) for _ in range(50_000)]
    file = tmp_path_factory.mktemp("real") / "real.json"
    file.write_text(json.dumps(lists))
    return file, lists


def test_the_table_is_the_file(published):
    file, lists = published
    table = read_real_labels(file)
    assert (table.dtype, table.shape) == (np.int32, (50_001, 4))
    assert (table[0] == -1).all()
    for number in (1, 2, 49_999, 50_000):
        assert [label for label in table[number] if label >= 0] == lists[number - 1]
    assert validation_number("ILSVRC2012_val_00000293.JPEG") == 293
    assert validation_number("n01440764_293.JPEG") == validation_number("") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{}", "list of 50,000 lists of class numbers, as published; it has dict"),
        ("[[1], [2]]", "it has 2 entries"),
        (json.dumps([[1], [], 7] + 49_997 * [[]]), "entry 2 is 7"),
        (json.dumps([[1], [999, 1000]] + 49_998 * [[]]), r"entry 1 is \[999, 1000\]"),
        (json.dumps([["cat"]] + 49_999 * [[]]), r"entry 0 is \['cat'\]"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    file = tmp_path / "real.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"real.json: .*{message}"):
        read_real_labels(file)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_real_labels(tmp_path / "other.json")


def test_counts_by_hand():
    logits = np.zeros((6, 5), np.float32)
    logits[range(6), [1, 1, 2, 3, 4, 0]] = 1
    logits[5, 2] = np.nan
    real = np.array([[1, -1], [0, 1], [0, 1], [-1, -1], [4, -1], [2, 0]], np.int32)
    mask = np.array([1, 1, 1, 1, 0, 1], np.float32)
    counts = jax.jit(real_label_counts)(logits, real, mask)
    # Right, right, wrong, without a label, padding, not a number.
    assert (counts["real_count"], counts["real_top1"]) == (4, 2)
    # Of equal logits the first class is taken.
    counts = real_label_counts(jnp.zeros((1, 5)), jnp.array([[1, 2]]), jnp.array([True]))
    assert (counts["real_count"], counts["real_top1"]) == (1, 0)


class Named:
    """Validation images, in another order than their numbers; one colour each."""

    num_classes = 1000
    numbers = (293, 50_000, 1, 17, 2, 4711, 8, 300, 12, 5)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        return {
            "image": np.full((8, 8, 3), 20 * index, np.uint8),
            "label": index,
            "file_name": f"ILSVRC2012_val_{number:08}.JPEG",
        }


class Brightness(nn.Module):
    """Gives the image at index i of Named the class ``classes[i]``."""

    classes: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32
    num_classes: int = 1000

    def __call__(self, images, train=False):
        index = jnp.round((images.mean((1, 2, 3)) * 0.25 + 0.5) * 255 / 20).astype(jnp.int32)
        return jax.nn.one_hot(jnp.asarray(self.classes)[index], self.num_classes)


@pytest.fixture
def config(published):
    config = default.get_config()
    config.data.image_size = 8
    config.data.mean, config.data.std = (0.5,) * 3, (0.25,) * 3
    config.eval.batch_size = 4
    config.eval.real_labels = str(published[0])
    return config


def test_labels_find_their_images_by_name(config, published, monkeypatch, caplog):
    _, lists = published
    caplog.set_level("INFO", "absl")
    by_image = [lists[number - 1] for number in Named.numbers]
    # Every second image gets one of its ReaL labels, where it has any; others their own number.
    classes = tuple(
        labels[-1] if labels and index % 2 else index for index, labels in enumerate(by_image)
    )
    monkeypatch.setattr(setup, "open_source", lambda data, split: Named())
    monkeypatch.setattr(setup, "_model", lambda config, num_classes: Brightness(classes))
    run = setup.set_up_evaluation(config, devices=jax.devices()[:1])
    with evaluate.EvalLoop(run, Watchdog(config.distributed)) as eval_loop:
        metrics = eval_loop.run({"raw": {}, "ema": {}})
        # Another pass is the same.
        assert eval_loop.run({"raw": {}, "ema": {}}) == metrics
    labelled = [index for index, labels in enumerate(by_image) if labels]
    right = [index for index in labelled if classes[index] in by_image[index]]
    assert 0 < len(right) < len(labelled) < len(Named.numbers)
    assert metrics["count"] == 10
    assert metrics["real_count"] == len(labelled)
    assert metrics["raw_real_top1"] == pytest.approx(100 * len(right) / len(labelled))
    assert metrics["raw_top1"] == 100 * sum(c == i for i, c in enumerate(classes)) / 10
    assert f"ReaL top-1 {metrics['ema_real_top1']:.2f} % of {len(labelled)}" in caplog.text
    config.eval.real_labels = ""
    run = setup.set_up_evaluation(config, devices=jax.devices()[:1])
    with evaluate.EvalLoop(run, Watchdog(config.distributed)) as eval_loop:
        assert "real_count" not in eval_loop.run({"raw": {}})


def test_the_file_is_read_once_and_named_if_it_cannot_be(config, monkeypatch):
    reads, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: reads.append(str(path)) or read_text(path))
    monkeypatch.setattr(setup, "open_source", lambda data, split: Named())
    setup.set_up_evaluation(config)
    assert reads == [config.eval.real_labels]
    config.eval.real_labels, config.log_every_steps = "/nowhere/real.json", 0
    message = r"--config.eval.real_labels=/nowhere/real.json: cannot be read"
    with pytest.raises(ValueError, match=message) as error:
        setup.set_up_evaluation(config)
    # Listed with the other problems.
    assert "--config.log_every_steps=0" in str(error.value)


def test_images_without_such_names_are_refused(config):
    config.data.name, config.data.eval_split = "digits", "test"
    with pytest.raises(ValueError, match="the first of 'digits' 'test' is named '', one of 10"):
        setup.set_up_evaluation(config)
