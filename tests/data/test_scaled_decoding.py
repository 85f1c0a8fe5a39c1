"""Crops of JPEGs that are decoded at a fraction of their size."""

import contextlib
import functools
import io
import itertools

import numpy as np
import pytest
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from cotnet_jax.configs import default
from cotnet_jax.data import pipeline, scaled_decoding, transforms
from cotnet_jax.data.examples import TrainExample

crop = functools.partial(
    scaled_decoding.random_resized_crop,
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    interpolation="bicubic",
)


@pytest.fixture(scope="module")
def photos():
    """Two photographs of 427 x 640, as JPEG."""
    return [encoded(photo) for photo in load_sample_images().images]


def encoded(pixels, file_format="JPEG", **options):
    file = io.BytesIO()
    options = {"quality": 92} | options if file_format == "JPEG" else options
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def both(data, size, seed, **options):
    """The same crop, decoded in full and scaled, as float arrays."""
    return [
        np.asarray(crop(data, size, np.random.default_rng(seed), scaled=scaled, **options), float)
        for scaled in (False, True)
    ]


def psnr(first, second):
    return 10 * np.log10(255**2 / max(np.mean((first - second) ** 2), 1e-9))


def decoded_sizes(monkeypatch):
    """Note the size of every image that is decoded."""
    sizes = []
    upright = transforms.upright

    def noted(image, orientation):
        image = upright(image, orientation)
        sizes.append(image.shape[:2])
        return image

    monkeypatch.setattr(transforms, "upright", noted)
    return sizes


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_large_crop_is_of_the_same_place(photos, monkeypatch, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(transforms.decode(photos[0]), exif=exif)
    sizes = decoded_sizes(monkeypatch)
    for seed in range(20):
        full, scaled = both(data, 32, seed, exif_orientation=True)
        assert scaled.shape == (32, 32, 3)
        # A shift by one pixel of the result gives 20.
        assert psnr(full, scaled) > 30
    whole = (640, 427) if orientation > 4 else (427, 640)
    assert {tuple(-(-side // factor) for side in whole) for factor in (1, 4, 8)} <= set(sizes)


def test_a_crop_that_needs_all_pixels_has_the_same(photos, monkeypatch):
    sizes = decoded_sizes(monkeypatch)
    for seed in range(10):
        full, scaled = both(photos[1], 224, seed)
        np.testing.assert_array_equal(full, scaled)
    assert set(sizes) == {(427, 640)}


def test_what_only_pillow_decodes_has_the_same_pixels(photos):
    pixels = transforms.decode(photos[1])
    file = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(file, "JPEG")
    for data in (encoded(pixels, "PNG"), file.getvalue()):
        for seed in range(5):
            np.testing.assert_array_equal(*both(data, 32, seed))
    # Harmless damage: simplejpeg refuses it.
    torn = photos[1][:-2] + b"\0\0" + photos[1][-2:]
    for seed in range(5):
        assert psnr(*both(torn, 32, seed)) > 30


def test_damage_and_size_are_errors(photos):
    for scaled in (False, True):
        options = {"rng": np.random.default_rng(0), "scaled": scaled}
        with pytest.raises(transforms.DecodeError):
            crop(photos[0][:2000], 32, **options)
        with pytest.raises(transforms.DecodeError, match="640 x 427 pixels, more than the limit"):
            crop(photos[0], 32, max_pixels=1000, **options)


class Photos:
    """A source of these files, over and over."""

    num_classes, class_names = 2, ("china", "flower")

    def __init__(self, files):
        self._files = files

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"image": self._files[index % len(self._files)], "label": 0, "file_name": ""}


def test_it_is_off_in_the_recipe_and_leaves_the_random_numbers_as_they_are(photos):
    config = default.get_config()
    assert not config.data.scaled_decoding
    config.data.image_size = 32
    config.augment.scale = (0.9, 1.0)
    made = []
    for config.data.scaled_decoding in (False, True):
        example = TrainExample(Photos(photos), config)
        rng = np.random.default_rng(3)
        made.append(example(0, rng)["image"].astype(float))
        made.append(rng.random())
    assert made[1] == made[3]
    assert psnr(made[0], made[2]) > 25
    assert (made[0] != made[2]).any()


def test_a_stream_is_the_same_for_any_threads_processes_and_first_step(photos):
    config = default.get_config()
    config.data.image_size, config.batch_size = 32, 4
    config.data.scaled_decoding, config.data.num_workers = True, 0

    def images(first_step, count, threads, **processes):
        config.data.num_threads = threads
        batches = pipeline.train_batches(
            config, start_step=first_step, source=Photos(photos), **processes
        )
        with contextlib.closing(batches):
            return [batch["image"] for batch in itertools.islice(batches, count)]

    whole = images(0, 5, 1)
    np.testing.assert_array_equal(images(2, 3, 3), whole[2:])
    halves = [images(2, 3, 1, process_index=index, process_count=2) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole[2:])
    config.data.scaled_decoding = False
    assert (np.array(images(0, 5, 1)) != whole).any()
