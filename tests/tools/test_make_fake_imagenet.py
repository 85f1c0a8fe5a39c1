"""The command that makes a fake ImageNet."""

import tarfile

import pytest
from PIL import Image

from cotnet_jax.data import imagenet
from cotnet_jax.tools import make_fake_imagenet


def test_tars_and_folders_have_the_same_images(tmp_path, capsys):
    output = tmp_path / "fake"
    options = ["--classes=3", "--train_per_class=2", "--validation=4"]
    assert make_fake_imagenet.main([f"--output={output}", *options]) == 0
    assert "6 training and 4 validation images" in capsys.readouterr().out
    in_folders = {
        path.name: path.read_bytes() for path in (output / "folders").rglob("*") if path.is_file()
    }
    in_tars = {}
    with tarfile.open(output / "tars" / imagenet.TRAIN_TAR) as outer:
        assert outer.getnames() == [f"{wnid}.tar" for wnid in imagenet.wnids()[:3]]
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                in_tars |= {each.name: inner.extractfile(each).read() for each in inner}
    with tarfile.open(output / "tars" / imagenet.VALIDATION_TAR) as archive:
        in_tars |= {each.name: archive.extractfile(each).read() for each in archive}
    assert in_tars == in_folders
    for path in (output / "folders" / "val").rglob("*.JPEG"):
        number = imagenet.validation_number(path.name)
        assert path.parent.name == imagenet.validation_wnids()[number - 1]
        Image.open(path).load()
    # Nothing is overwritten.
    assert make_fake_imagenet.main([f"--output={output}", *options]) == 1
    assert f"error: {output}/tars already exists" in capsys.readouterr().err


def test_help_begins_with_examples_and_errors_name_the_option(capsys):
    with pytest.raises(SystemExit):
        make_fake_imagenet.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert all("python -m cotnet_jax." in line for line in lines[1:4])
    with pytest.raises(SystemExit):
        make_fake_imagenet.main(["--output=x", "--classes=1001"])
    assert "--classes: '1001' is not in 1 to 1,000" in capsys.readouterr().err
