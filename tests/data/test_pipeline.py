"""Batches: the same numbers for any threads, workers, processes and starting step."""

import io
import itertools
import os
import time

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import default
from cotnet_jax.data import digits, pipeline, sources
from cotnet_jax.data.undecodable import UndecodableError

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    digits.builder(str(folder))
    return folder


@pytest.fixture
def config(data_dir):
    config = default.get_config()
    config.data.name = "digits"
    config.data.data_dir = str(data_dir)
    config.data.train_split, config.data.eval_split = "train[:100]", "test[:45]"
    config.data.image_size = 16
    config.data.num_workers, config.data.num_threads = 0, 2
    config.batch_size = 24
    config.eval.batch_size = 16
    return config


def take(config, number, start_step=0, **processes):
    batches = pipeline.train_batches(config, start_step=start_step, **processes)
    result = list(itertools.islice(batches, number))
    batches.close()
    return result


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes(config):
    (batch,) = take(config, 1)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (24, 16, 16, 3))
    assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (24,))
    assert pipeline.steps_per_epoch(config) == 4


# Epochs are 4 steps long: the stream is entered inside, at the end of and after an epoch.
@pytest.mark.parametrize("start_step", [0, 1, 4, 9])
@pytest.mark.parametrize("threads", [1, 5])
def test_resumed_stream_is_the_uninterrupted_one(config, start_step, threads):
    whole = take(config, 13)
    config.data.num_threads = threads
    assert_same(take(config, 13 - start_step, start_step), whole[start_step:])


@pytest.mark.parametrize("workers", [2, -1])
def test_worker_processes_change_nothing(config, workers):
    whole = take(config, 12)
    config.data.num_workers = workers
    assert_same(take(config, 7, 5), whole[5:])


@pytest.mark.parametrize("workers", [0, 2])
def test_with_randaugment_on_the_device_batches_are_cropped_and_flipped_only(config, workers):
    config.augment.randaugment, config.augment.color_jitter = "", 0.0
    plain = take(config, 5)
    config.augment.randaugment, config.augment.randaugment_on = "rand-m15-n2", "device"
    config.augment.color_jitter = 0.4
    config.data.num_workers = workers
    assert_same(take(config, 3, 2), plain[2:])


class NeedsTwoProcesses:
    """A source that gives nothing before two processes have asked."""

    num_classes, class_names = 1, ("noise",)

    def __init__(self, folder):
        self._folder = folder

    def __len__(self):
        return 100

    def __getitem__(self, index):
        (self._folder / str(os.getpid())).touch()
        end = time.monotonic() + 30
        while len(list(self._folder.iterdir())) < 2:
            assert time.monotonic() < end, "the second worker did not start"
            time.sleep(0.01)
        return {"image": np.zeros((16, 16, 3), np.uint8), "label": 0, "file_name": ""}


def test_workers_start_together(config, tmp_path):
    config.data.num_workers = 2
    assert take(config, 1, source=NeedsTwoProcesses(tmp_path))


@pytest.mark.parametrize("process_count", [2, 3, 8])
def test_processes_share_the_same_global_batch(config, process_count):
    whole = take(config, 3, 3)
    parts = [
        take(config, 3, 3, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_balanced_batches_are_the_same_for_processes_threads_and_starts(config):
    config.data.train_split = "train[:50]+train[900:950]"
    config.data.balanced_sampling = True
    whole = take(config, 11)
    config.data.num_threads = 5
    parts = [take(config, 6, 5, process_index=index, process_count=2) for index in range(2)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole[5:])
    labels = np.concatenate([batch["label"] for batch in whole[:8]])
    for epoch in labels.reshape(2, 96):
        assert set(np.bincount(epoch)) <= {9, 10}


def test_seed_changes_order_and_augmentation(config):
    first = take(config, 2)
    config.seed += 1
    second = take(config, 2)
    assert any((a["label"] != b["label"]).any() for a, b in zip(first, second, strict=True))


class Numbered:
    """Images whose grey level is their index: identifiable after any crop and flip."""

    num_classes, class_names = 10, tuple("0123456789")

    def __init__(self, length, undecodable=()):
        self._length, self._undecodable = length, set(undecodable)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if index in self._undecodable:
            return {"image": b"no image", "label": 0, "file_name": ""}
        file = io.BytesIO()
        Image.new("L", (8, 8), index).save(file, "PNG")
        return {"image": file.getvalue(), "label": index % 10, "file_name": ""}


@pytest.fixture
def numbered(config, monkeypatch):
    config.augment.randaugment, config.augment.color_jitter = "", 0.0

    def use(length, undecodable=()):
        source = Numbered(length, undecodable)
        monkeypatch.setattr(pipeline, "open_source", lambda data, split: source)
        return source

    return use


def indices(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def all_indices(batches):
    return [index for batch in batches for index in indices(batch)]


def test_every_epoch_has_each_image_at_most_once_in_a_new_order(config, numbered):
    numbered(100)
    batches = take(config, 12)
    epochs = [all_indices(batches[start : start + 4]) for start in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch)) == 96
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # What one epoch leaves out is not what the others leave out.
    assert len(set.intersection(*(set(range(100)) - set(epoch) for epoch in epochs))) < 4
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], np.array(indices(batch)) % 10)


def test_augmentation_differs_between_epochs(config):
    config.data.train_split = "train[:1]"
    config.batch_size = 1
    images = {batch["image"].tobytes() for batch in take(config, 10)}
    assert len(images) > 5


@pytest.mark.parametrize(
    ("length", "batch_size", "process_count", "workers"),
    [(45, 16, 1, 0), (45, 16, 4, 0), (48, 16, 2, 0), (3, 16, 4, 0), (45, 16, 1, 2), (1, 1, 1, 0)],
)
def test_evaluation_counts_every_image_once(
    config, numbered, length, batch_size, process_count, workers
):
    numbered(length)
    config.eval.batch_size = batch_size
    config.data.num_workers = workers
    shares = [
        list(pipeline.eval_batches(config, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    assert {len(share) for share in shares} == {-(-length // batch_size)}
    seen = []
    for batch in itertools.chain(*shares):
        assert batch.keys() == {"image", "label", "mask"}
        assert batch["mask"].dtype == np.float32
        assert batch["image"].shape == (batch_size // process_count, 16, 16, 3)
        counted = batch["mask"] == 1
        assert (counted | (batch["mask"] == 0)).all()
        seen += np.array(indices(batch))[counted].tolist()
        np.testing.assert_array_equal(
            batch["label"][counted], np.array(indices(batch))[counted] % 10
        )
    assert sorted(seen) == list(range(length))


@pytest.mark.parametrize(("process_count", "workers"), [(1, 0), (4, 0), (1, 2)])
def test_repeated_evaluation_is_the_same_pass_again(config, process_count, workers):
    config.data.num_workers = workers
    once = list(pipeline.eval_batches(config, process_count=process_count))
    batches = pipeline.eval_batches(config, process_count=process_count, repeat=True)
    steps = len(once)
    passes = [list(itertools.islice(batches, steps)) for _ in range(3)]
    batches.close()
    for again in passes:
        assert_same(again, once)


def test_undecodable_training_images_are_replaced_by_the_next(config, numbered, caplog):
    numbered(96, undecodable=[5, 50, 51])
    config.data.max_undecodable = 3 / 96
    epoch = all_indices(take(config, 4))
    expected = [{5: 6, 50: 52, 51: 52}.get(index, index) for index in range(96)]
    assert sorted(epoch) == sorted(expected)
    # Each is reported once, however many epochs go by.
    caplog.clear()
    take(config, 9)
    reports = [record.getMessage() for record in caplog.records if "decoded" in record.getMessage()]
    assert len(reports) == 3
    for index in (5, 50, 51):
        assert any(f"Image {index} of" in report for report in reports)


def test_too_many_undecodable_images_stop_the_run(config, numbered):
    numbered(96, undecodable=[5, 50, 51])
    config.data.max_undecodable = 2 / 96
    with pytest.raises(UndecodableError, match=r"3 of the 96 .*max_undecodable.*5, 50, 51"):
        take(config, 4)


def test_a_split_of_undecodable_images_stops_at_once(config, numbered):
    numbered(96, undecodable=range(96))
    config.data.max_undecodable = 1.0
    with pytest.raises(UndecodableError, match="none of the 32 images"):
        take(config, 1)


def test_undecodable_evaluation_images_are_black_and_counted(config, numbered):
    numbered(20, undecodable=[7])
    config.data.max_undecodable = 1 / 20
    config.eval.batch_size = 20
    (batch,) = pipeline.eval_batches(config)
    assert batch["mask"].sum() == 20
    assert not batch["image"][7].any()
    config.data.max_undecodable = 0.0
    with pytest.raises(UndecodableError, match="1 of the 20"):
        list(pipeline.eval_batches(config))


def test_synthetic_images_pass_unchanged(config):
    config.data.name = "synthetic"
    config.data.train_split, config.data.eval_split = "train[:64]", "validation[:20]"
    (batch,) = take(config, 1)
    source = sources.open_source(config.data, "train[:64]")
    known = {source[index]["image"].tobytes() for index in range(64)}
    assert all(image.tobytes() in known for image in batch["image"])
    assert sum(batch["mask"].sum() for batch in pipeline.eval_batches(config)) == 20


def test_bad_batch_sizes_name_the_field(config):
    with pytest.raises(ValueError, match=r"config\.batch_size = 24 .* 5 processes"):
        pipeline.train_batches(config, start_step=0, process_count=5)
    with pytest.raises(ValueError, match=r"config\.eval\.batch_size = 16 .* 3 processes"):
        pipeline.eval_batches(config, process_count=3)
    config.batch_size = 101
    with pytest.raises(ValueError, match=r"config\.batch_size = 101 is more than the 100"):
        pipeline.train_batches(config, start_step=0)


def test_settings_reach_the_images(config):
    """Every field of config.augment changes the batch."""
    reference = take(config, 1)
    changes = {
        "scale": (0.5, 0.6),
        "ratio": (1.0, 1.0),
        "flip": 1.0,
        "randaugment": "rand-m3-n1",
        "erasing_probability": 1.0,
    }
    for name, value in changes.items():
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.augment[name] = value
        assert (take(changed, 1)[0]["image"] != reference[0]["image"]).any(), name
