"""Elements of a dataset: labels of no class, orientation, and images that are too large."""

import contextlib
import io
import itertools

import numpy as np
import pytest
from absl import flags
from helpers import small_dataset
from PIL import Image

from cotnet_jax.data import imagenet, pipeline, sources, transforms


def first_training_batch(config):
    """Ends the stream's threads, which would go on transforming images in the next test."""
    with contextlib.closing(pipeline.train_batches(config, start_step=0)) as batches:
        return next(batches)


@pytest.mark.parametrize("label", [-1, 2, 1000, -2, 2**31, 2**40, -(2**40)])
def test_a_label_of_no_class_is_refused_with_split_record_and_number(tmp_path, label):
    folder = small_dataset.write(tmp_path / "data", [0, 1, 0, 1, 0, label, 0, 1])
    config = small_dataset.config_for(folder)
    words = rf"record 5 of split 'train' has the label {label}\b.*2 classes are 0 to 1"
    with pytest.raises(sources.LabelError, match=words):
        list(pipeline.eval_batches(config))
    batches = pipeline.train_batches(config, start_step=0)
    with pytest.raises(sources.LabelError, match=words):
        list(itertools.islice(batches, 2))


def test_a_label_of_no_class_in_a_worker_process_is_the_same_error(tmp_path):
    config = small_dataset.config_for(small_dataset.write(tmp_path / "data", [0, 1, 0, -1]))
    # Grain's workers read absl's flags, which only absl.app parses.
    flags.FLAGS.mark_as_parsed()
    config.data.num_workers = 1
    with pytest.raises(sources.LabelError, match=r"record 3 .* label -1 \(TFDS's mark"):
        list(pipeline.eval_batches(config))


def test_the_label_that_counts_is_that_of_the_image_that_replaces_another(tmp_path):
    images = [small_dataset.png(0), b"no image", small_dataset.png(2), small_dataset.png(3)]
    config = small_dataset.config_for(small_dataset.write(tmp_path / "data", [0, -1, 1, 1], images))
    config.data.max_undecodable = 0.5
    batch = first_training_batch(config)
    np.testing.assert_array_equal(np.sort(batch["label"]), [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "setting", "applied"),
    [
        (small_dataset.NAME, None, True),
        (small_dataset.NAME, True, True),
        (small_dataset.NAME, False, False),
        (imagenet.NAME, None, False),
        (imagenet.NAME, True, True),
    ],
)
def test_exif_orientation_is_applied_in_folders_of_ones_own(
    tmp_path, monkeypatch, name, setting, applied
):
    monkeypatch.setattr(small_dataset, "NAME", name)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    folder = small_dataset.write(tmp_path / "data", [0] * 4, [file.getvalue()] * 4)
    config = small_dataset.config_for(folder)
    config.data.exif_orientation, config.data.crop = setting, 1.0
    config.augment.update(scale=(1.0, 1.0), ratio=(1.0, 1.0), randaugment="", color_jitter=0.0)
    expected = pixels[::-1] if applied else pixels
    (evaluated,) = pipeline.eval_batches(config)
    trained = first_training_batch(config)
    for batch in (evaluated, trained):
        np.testing.assert_array_equal(batch["image"], [expected] * 4)


def test_images_beyond_the_limit_are_undecodable(tmp_path):
    images = [small_dataset.png(0), small_dataset.png(1, side=9), *map(small_dataset.png, (2, 3))]
    config = small_dataset.config_for(small_dataset.write(tmp_path / "data", [0] * 4, images))
    config.data.max_pixels, config.data.max_undecodable = 64, 0.25
    (batch,) = pipeline.eval_batches(config)
    assert [bool(image.any()) for image in batch["image"]] == [True, False, True, True]


def test_out_of_memory_in_a_transform_is_an_undecodable_image(tmp_path, monkeypatch):
    images = [small_dataset.png(0), small_dataset.png(1, side=9), *map(small_dataset.png, (2, 3))]
    folder = small_dataset.write(tmp_path / "data", [0] * 4, images)
    config = small_dataset.config_for(folder)
    config.data.max_undecodable, config.data.crop = 0.25, 1.0
    config.augment.update(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    resize = transforms.resize

    def fails_for_one(image, *args):
        if len(image) == 9:
            raise MemoryError
        return resize(image, *args)

    monkeypatch.setattr(transforms, "resize", fails_for_one)
    (batch,) = pipeline.eval_batches(config)
    assert [bool(image.any()) for image in batch["image"]] == [True, False, True, True]
    assert first_training_batch(config)["image"].any(axis=(1, 2, 3)).all()
