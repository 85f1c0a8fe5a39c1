"""The digits, prepared folders and synthetic images; errors for what is not there."""

import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from cotnet_jax.data import digits, sources, transforms


def data_config(name, data_dir="", fake=False):
    return ml_collections.ConfigDict(
        {"name": str(name), "data_dir": str(data_dir), "image_size": 32, "fake": fake}
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    digits.builder(str(folder))
    return folder


def test_digits_are_all_there_and_split_by_class(data_dir):
    splits = {
        name: sources.open_source(data_config("digits", data_dir), name)
        for name in ("train", "test")
    }
    assert [len(source) for source in splits.values()] == [1438, 359]
    seen, counts = [], {}
    for name, source in splits.items():
        elements = [source[index] for index in range(len(source))]
        images = [transforms.decode(element["image"]) for element in elements]
        assert {image.shape for image in images} == {(8, 8, 3)}
        seen += [
            (image[..., 0].tobytes(), element["label"])
            for image, element in zip(images, elements, strict=True)
        ]
        counts[name] = np.bincount([element["label"] for element in elements], minlength=10)
    original = load_digits()
    ink = np.minimum(original.images * 16, 255).astype(np.uint8)
    expected = [(image.tobytes(), label) for image, label in zip(ink, original.target, strict=True)]
    assert sorted(seen) == sorted(expected)
    np.testing.assert_array_equal(counts["test"], np.rint(0.2 * (counts["train"] + counts["test"])))


def test_digits_are_written_once(data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    digits.builder(str(data_dir))
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def test_digits_written_twice_are_the_same(data_dir, tmp_path):
    first = digits.builder(str(data_dir)).as_data_source("test")
    second = digits.builder(str(tmp_path)).as_data_source("test")
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["label"] == b["label"]


def test_digits_written_by_several_processes_at_once(tmp_path):
    command = (
        "from cotnet_jax.data import digits; import sys;"
        "print(digits.builder(sys.argv[1]).info.splits['train'].num_examples)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output.strip() == "1438", errors
    assert [path.name for path in (tmp_path / "sklearn_digits").iterdir()] == ["1.0.0"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits.SklearnDigits, "download_and_prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.builder(str(tmp_path))
    assert not list((tmp_path / "sklearn_digits").iterdir())
    monkeypatch.undo()
    assert digits.builder(str(tmp_path)).is_prepared()


@pytest.mark.parametrize("folder", ["sklearn_digits/1.0.0", "sklearn_digits", "."])
def test_prepared_folder_is_opened_by_its_path(data_dir, folder):
    source = sources.open_source(data_config(data_dir / folder), "test")
    assert (len(source), source.num_classes) == (359, 10)
    assert list(source.class_names) == [str(digit) for digit in range(10)]


def test_splits_can_be_sliced(data_dir):
    source = sources.open_source(data_config("digits", data_dir), "train[:50%]")
    assert len(source) == 719


def test_synthetic():
    source = sources.open_source(data_config("synthetic"), "train")
    assert (len(source), source.num_classes) == (1_281_167, 1000)
    element = source[1_281_166]
    assert (element["image"].dtype, element["image"].shape) == (np.uint8, (32, 32, 3))
    np.testing.assert_array_equal(element["image"], source[1_281_166]["image"])
    assert 0 <= element["label"] < 1000
    part = sources.open_source(data_config("synthetic"), "validation[100:164]")
    assert len(part) == 64
    joined = sources.open_source(
        data_config("synthetic"), "train[:3]+validation[100:164]+train[:2]"
    )
    assert len(joined) == 69
    for index, (other, position) in {
        2: (source, 2),
        3: (part, 0),
        66: (part, 63),
        67: (source, 0),
        68: (source, 1),
    }.items():
        assert joined[index]["label"] == other[position]["label"]
        np.testing.assert_array_equal(joined[index]["image"], other[position]["image"])
    with pytest.raises(IndexError):
        joined[69]
    whole = sources.open_source(data_config("synthetic"), "validation")
    np.testing.assert_array_equal(part[0]["image"], whole[100]["image"])
    assert part[0]["label"] == whole[100]["label"]


def test_fake_images_keep_classes_and_sizes(data_dir, tmp_path):
    for name in ("digits", data_dir / "sklearn_digits"):
        for split, size in (("train", 1438), ("test", 359), ("test[:10%]", 36)):
            source = sources.open_source(data_config(name, data_dir, fake=True), split)
            assert (len(source), source.num_classes) == (size, 10)
            assert list(source.class_names) == [str(digit) for digit in range(10)]
            assert source[size - 1]["image"].shape == (32, 32, 3)
            assert {source[index]["label"] for index in range(10)} == set(range(10))
    # ImageNet is known without being there; of others nothing is.
    imagenet = sources.open_source(data_config("imagenet2012", tmp_path, fake=True), "validation")
    assert (len(imagenet), imagenet.num_classes) == (50_000, 1000)
    for name in ("cifar10", tmp_path / "nothing"):
        with pytest.raises(sources.DatasetError):
            sources.open_source(data_config(name, tmp_path, fake=True), "train")


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("digits", "validation", ["no split 'validation'", "train, test"]),
        ("synthetic", "test", ["no split 'test'", "train, validation"]),
        ("synthetic", "train[", ["no split 'train['"]),
        ("/no/such/folder", "train", ["/no/such/folder", "cotnet-prepare folder"]),
        ("imagenet2012", "train", ["imagenet2012/5", "cotnet-prepare imagenet", "data_dir="]),
        ("cifar10", "train", ["cifar10/3", "download_and_prepare()"]),
        ("imagnet2012", "train", ["'imagnet2012'", "'imagenet2012'", "cotnet-prepare folder"]),
    ],
)
def test_what_is_missing_is_said_with_the_command(data_dir, name, split, words):
    with pytest.raises(sources.DatasetError) as error:
        sources.open_source(data_config(name, data_dir), split)
    for word in words:
        assert word in str(error.value)


def test_folder_with_nothing_or_too_much_prepared_in_it(tmp_path):
    with pytest.raises(sources.DatasetError, match="no prepared dataset"):
        sources.open_source(data_config(tmp_path), "train")
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    with pytest.raises(sources.DatasetError, match=r"2 prepared datasets(.|\n)*1\.0\.0"):
        sources.open_source(data_config(tmp_path), "train")


def test_dataset_without_labels_is_refused(data_dir, monkeypatch):
    builder = tfds.builder_from_directory(data_dir / "sklearn_digits" / "1.0.0")
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 1))})
    monkeypatch.setattr(type(builder.info), "features", features)
    with pytest.raises(sources.DatasetError, match="no feature label"):
        sources.TfdsSource(builder, "train")
