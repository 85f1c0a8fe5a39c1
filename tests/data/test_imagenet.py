"""ImageNet's facts agree with the files that TFDS ships."""

import subprocess
import sys

import pytest

from cotnet_jax.data import class_names, imagenet


def test_classes_and_validation_labels():
    wnids, labels = imagenet.wnids(), imagenet.validation_wnids()
    assert (
        len(wnids) == len(set(wnids)) == imagenet.NUM_CLASSES == len(class_names.imagenet_names())
    )
    assert wnids == sorted(wnids)
    assert len(labels) == imagenet.NUM_IMAGES["validation"]
    # Fifty images of every class.
    assert sorted(labels) == sorted(wnids * 50)


def test_validation_names_and_numbers():
    assert imagenet.validation_name(293) == "ILSVRC2012_val_00000293.JPEG"
    for number in (1, 293, 50_000):
        name = imagenet.validation_name(number)
        assert imagenet.validation_number(name) == number
        assert imagenet.validation_number(name.lower()) == number


@pytest.mark.parametrize(
    "name",
    [
        "",
        "n01440764_293.JPEG",
        "ILSVRC2012_val_00000000.JPEG",
        "ILSVRC2012_val_00050001.JPEG",
        "ILSVRC2012_val_293.JPEG",
        "ILSVRC2012_val_00000293.JPEG.txt",
    ],
)
def test_other_names_have_no_number(name):
    assert imagenet.validation_number(name) == 0


def test_the_constants_need_no_tfds():
    code = (
        "import sys, cotnet_jax.data.imagenet as i; print(i.NUM_CLASSES, "
        "'tensorflow_datasets' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "1000 False\n"
