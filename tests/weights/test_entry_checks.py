"""What the JSON files beside weights say is checked before it is used, and all of it at once."""

import json

import numpy as np
import pytest
from helpers.tiny_runs import CONFIG

import cotnet_jax
from cotnet_jax.weights import folder, loading
from cotnet_jax.weights.folder import WeightsError

DESCRIPTION = {
    "format": folder.FORMAT,
    "model": "cotnet_tiny",
    "num_classes": 2,
    "weights": "ema",
    "source": {},
    "default_cfg": cotnet_jax.create_model("cotnet_tiny").default_cfg,
    "settings": {
        "image_size": 32,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    },
    "attributes": {"output_stride": 32},
    "class_names": ["a", "b"],
    "num_batches_tracked": 1,
    "files": {},
}


def changed(description, change):
    """A copy with entries replaced, by "section.entry" too; ... removes one."""
    copy = json.loads(json.dumps(description))
    for name, value in change.items():
        *sections, entry = name.split(".")
        place = copy
        for section in sections:
            place = place[section]
        place[entry] = value
        if value is ...:
            del place[entry]
    return json.dumps(copy)


def test_what_this_and_earlier_versions_write_is_believed(tmp_path):
    earlier = dict.fromkeys(("settings", "attributes", "class_names", "num_classes"), ...)
    for change in ({}, {"class_names": None}, earlier):
        (tmp_path / "cotnet.json").write_text(changed(DESCRIPTION, change))
        assert folder.read_description(tmp_path)["model"] == "cotnet_tiny"


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"model": ...}, ["model: must be the name of a model, not None"]),
        ({"model": "resnet", "weights": 7}, ["not 'resnet'", 'weights: must be "ema" or "raw"']),
        ({"source": None, "files": []}, ["source: must be a dictionary", "files: must be a"]),
        ({"num_batches_tracked": -1}, ["num_batches_tracked: must be a whole number, 0 or"]),
        ({"settings": 3}, ["settings: must be a dictionary, not 3"]),
        ({"settings.crop": 0, "settings.mean": "x"}, ["settings.crop: must", "settings.mean"]),
        ({"settings.image_size": "32"}, ["settings.image_size: must be 1 or more, not '32'"]),
        ({"attributes.output_stride": 7}, ["attributes.output_stride: must be 8, 16 or 32"]),
        ({"class_names": ["a"]}, ["class_names: must be null or as many"]),
        ({"class_names": ["a", "b\n"]}, ["class_names[1]: must be one line of text"]),
        ({"settings": ..., "default_cfg": {}}, ["settings.image_size", "settings.std"]),
        ({"settings": ..., "default_cfg.input_size": 32}, ["settings.image_size: must be"]),
        ({"settings": ..., "default_cfg": 3}, ["settings: must be a dictionary, not None"]),
        ({"class_names": ["\n"] * 99, "num_classes": 99}, ["99 entries cannot", "and 79 more"]),
    ],
)
def test_a_description_that_cannot_be_used_lists_all_that_is_wrong(tmp_path, change, lines):
    (tmp_path / "cotnet.json").write_text(changed(DESCRIPTION, change))
    for read in (folder.read_description, loading.read_weights, loading.read_settings):
        with pytest.raises(WeightsError) as error:
            read(tmp_path)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'cotnet.json'}: ")
        assert message.endswith("Convert the weights again.")
        assert all(line in message for line in lines), message


@pytest.mark.parametrize("content", ["", "[]", "null", '{"format":', "[" * 100_000, "\udcff"])
def test_a_torn_description_names_its_file(tmp_path, content):
    (tmp_path / "cotnet.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=r"cotnet\.json: cannot be read"):
        loading.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"model.name": 7, "data.crop": 0}, ["model.name: must be the name", "data.crop: must"]),
        ({"data": [], "ema": None}, ["data: must be a section", "ema: must be a section"]),
        ({"ema.decay": "x"}, ["ema.decay: must be from 0 to below 1, not 'x'"]),
        ({"model.output_stride": "8"}, ["model.output_stride: must be 8, 16 or 32"]),
        ({"data.mean": [1, 2]}, ["data.mean: must be three numbers"]),
        ({"data.std": [np.nan] * 3, "data.name": 3}, ["data.std", "data.name: must be the name"]),
    ],
)
def test_a_runs_configuration_that_cannot_be_used(tmp_path, change, lines):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(changed(CONFIG, change))
    with pytest.raises(WeightsError) as error:
        loading.read_weights(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: the configuration of this run is dam")
    assert "starts.jsonl" in message
    assert all(line in message for line in lines), message
