"""Loading of weights from every kind of place."""

import dataclasses
import io
import json
import logging
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden
from helpers import torch_file_builder as build
from helpers.tiny_runs import CLASSES, CONFIG, equal, make_workdir, variables_of

import cotnet_jax
from cotnet_jax.weights import convert, loading, name_map
from cotnet_jax.weights.folder import NewFolder, WeightsError

pytestmark = pytest.mark.end_to_end

IMAGE = np.ones((1, 32, 32, 3), np.float32)


def output_shape(model, variables):
    return jax.eval_shape(model.apply, variables, IMAGE).shape


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=CLASSES)
    data = build.training_checkpoint(golden.state_dict(shapes, 1), golden.state_dict(shapes, 2))
    path = tmp_path_factory.mktemp("torch") / "tiny.pth.tar"
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def folder(torch_file):
    path = torch_file.with_name("tiny")
    convert.convert_torch_file(torch_file, path)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_file_and_folder(torch_file, folder, kind):
    model, variables = loading.load(torch_file if kind == "file" else folder)
    assert equal(variables, variables_of(2))
    assert model == cotnet_jax.create_model("cotnet_tiny", num_classes=CLASSES)
    assert output_shape(model, variables) == (1, CLASSES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


def test_raw_of_a_file_and_of_a_folder(torch_file, folder):
    assert equal(loading.load(torch_file, kind="raw")[1], variables_of(1))
    with pytest.raises(WeightsError, match=r"tiny.pth.tar again with --kind=raw"):
        loading.load(folder, kind="raw")
    with pytest.raises(ValueError, match="'ema', 'raw' or None, not 'best'"):
        loading.load(folder, kind="best")


def test_workdir_gives_its_best_averages(workdir):
    before = sorted(str(path) for path in workdir.rglob("*"))
    model, variables = loading.load(workdir)
    assert equal(variables, variables_of(22))
    assert model.output_stride == 16
    assert equal(loading.load(workdir, kind="raw")[1], variables_of(12))
    assert loading.load(workdir, output_stride=32)[0].output_stride == 32
    read = loading.read_weights(workdir)
    assert read.settings == {key: CONFIG["data"][key] for key in read.settings}
    assert len(read.settings) == 5
    assert read.batches == 2
    assert "best checkpoint, step 2" in read.notes[0]
    assert sorted(str(path) for path in workdir.rglob("*")) == before, "reading changes nothing"


def test_one_step_of_a_workdir(workdir):
    read = loading.read_weights(workdir / "checkpoints" / "3")
    assert (read.kind, read.batches) == ("ema", 3)
    assert equal(read.variables, variables_of(23))
    raw = loading.read_weights(workdir / "checkpoints" / "1", "raw")
    assert equal(raw.variables, variables_of(11))
    assert "chosen checkpoint, step 1" in raw.notes[0]
    with pytest.raises(WeightsError, match=r"step 7 in .*; there are: 1, 2, 3"):
        loading.read_weights(workdir / "checkpoints" / "7")


def test_workdir_without_averages_or_evaluation(tmp_path):
    off = CONFIG | {"ema": {"decay": 0}}
    path = make_workdir(tmp_path / "off", off, ((1, 30.0), (2, 20.0)), ema=False)
    read = loading.read_weights(path)
    assert (read.kind, read.batches) == ("raw", 1)
    assert equal(read.variables, variables_of(11))
    with pytest.raises(WeightsError, match="no EMA"):
        loading.load(path, kind="ema")
    path = make_workdir(tmp_path / "new", CONFIG, ((1, None), (2, None)))
    read = loading.read_weights(path)
    assert equal(read.variables, variables_of(22))
    assert "latest checkpoint, step 2" in read.notes[0]


def test_workdir_back_to_torch(tmp_path, workdir):
    output = tmp_path / "w.safetensors"
    convert.convert_to_torch(workdir, output)
    read = loading.read_weights(output)
    assert (read.model, read.batches, read.num_classes) == ("cotnet_tiny", 2, CLASSES)
    assert equal(read.variables, variables_of(22))


def spoilt(kind):
    """Variables with values of one kind that no weights have, and the report's lines."""
    variables = variables_of(2)
    stem = variables["params"]["stem"]["conv1"]
    norm = variables["batch_stats"]["stem"]["bn"]
    if kind == "NaN":
        stem["kernel"] = stem["kernel"].copy()
        stem["kernel"][0, 1, 2, :2] = np.nan
        return variables, ["params/stem/conv1/kernel: 2 of", "are NaN, the first at [0, 1, 2, 0]"]
    if kind == "several":
        norm["var"] = norm["var"].copy()
        norm["var"][:2] = -1, np.inf
        variables["params"]["head"]["bias"] = np.full(CLASSES, -np.inf, np.float32)
        return variables, [
            "2 arrays of weights",
            "batch_stats/stem/bn/var: 1 of 32 values is infinite, at [1]; 1 of 32 values is "
            "negative",
            "params/head/bias: 10 of 10 values are infinite",
        ]
    dtype = {"complex": np.complex64, "int8": np.int8, "bool": bool}[kind]
    stem["kernel"] = stem["kernel"].astype(dtype)
    return variables, ["params/stem/conv1/kernel: ", np.dtype(dtype).name, "not a floating-point"]


@pytest.mark.parametrize("kind", ["NaN", "several", "int8"])
def test_folder_whose_values_are_no_numbers(tmp_path, kind):
    variables, lines = spoilt(kind)
    with NewFolder(tmp_path / "bad") as new:
        source = {"file": "x.pth", "format": "zip"}
        description = {"model": "cotnet_tiny", "weights": "ema", "source": source}
        default_cfg = cotnet_jax.create_model("cotnet_tiny").default_cfg
        description |= {"default_cfg": default_cfg, "num_batches_tracked": 1}
        new.write(variables, description)
        new.publish()
    for load in (loading.load, loading.read_weights, cotnet_jax.Predictor.load):
        with pytest.raises(WeightsError) as error:
            load(tmp_path / "bad")
        assert all(line in str(error.value) for line in [str(tmp_path / "bad"), *lines])


@pytest.mark.parametrize("kind", ["NaN", "several", "complex", "int8", "bool"])
def test_weights_in_memory_whose_values_are_no_numbers(folder, kind):
    read = loading.read_weights(folder)
    variables, lines = spoilt(kind)
    with pytest.raises(ValueError, match="of weights cannot be used") as error:
        cotnet_jax.Predictor(dataclasses.replace(read, variables=variables))
    assert all(line in str(error.value) for line in lines)


@pytest.mark.parametrize(
    ("dtype", "value", "problem"),
    [
        (np.complex64, 1j, "complex64, which is not a floating-point type"),
        (np.int8, 1, "int8, which is not a floating-point type"),
        (np.float64, 1e300, "is too large for float32, at [2]"),
        (np.float16, np.nan, "is NaN, at [2]"),
        (np.float32, -np.inf, "is infinite, at [2]"),
    ],
)
def test_state_dict_whose_values_are_no_numbers(dtype, value, problem):
    state_dict = golden.state_dict(name_map.torch_shapes("cotnet_tiny"), 0)
    for name in ("bn1.weight", "layer3.0.bn3.running_mean"):
        state_dict[name] = state_dict[name].astype(dtype)
        state_dict[name][2] = value
    state_dict["layer1.0.bn1.running_var"] = -state_dict["layer1.0.bn1.running_var"]
    with pytest.raises(ValueError, match="3 arrays of weights") as error:
        cotnet_jax.from_torch_state_dict("cotnet_tiny", state_dict)
    lines = str(error.value).splitlines()[1:]
    assert sum(line.endswith(problem) for line in lines) == 2
    assert sum("layer1.0.bn1.running_var: " in line and "negative" in line for line in lines) == 1


def test_weights_too_large_for_the_dtype_asked_for(folder):
    read = loading.read_weights(folder)
    read.variables["params"]["head"]["bias"] = np.full(CLASSES, 1e5, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_weights", lambda *_: read)
        loading.load(folder, param_dtype=jnp.bfloat16)
        with pytest.raises(WeightsError, match="10 of 10 values are too large for float16"):
            loading.load(folder, param_dtype=jnp.float16)


def test_checkpoint_whose_values_are_no_numbers(tmp_path):
    spoilt = variables_of(23)
    spoilt["params"]["head"]["bias"][3] = np.nan
    path = make_workdir(
        tmp_path / "run",
        steps=((2, 50.0), (3, 60.0)),
        variables=lambda seed: spoilt if seed == 23 else variables_of(seed),
    )
    with pytest.raises(WeightsError, match=r"step 3: 1 arrays .*\n.*ema/params/head/bias: 1 of 10"):
        loading.read_weights(path / "checkpoints" / "3")
    # The best one that is finite.
    read = loading.read_weights(path)
    assert equal(read.variables, variables_of(22))
    assert (read.batches, read.source["ema_top1"]) == (2, 50.0)


def test_metric_that_is_not_a_number(tmp_path):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=CLASSES)
    data = build.training_checkpoint(golden.state_dict(shapes, 1), None)
    metric, nan = struct.pack(">d", 81.3), struct.pack(">d", np.nan)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(changed, "w") as archive:
        for name in given.namelist():
            archive.writestr(name, given.read(name).replace(metric, nan))
    (tmp_path / "nan.pth").write_bytes(changed.getvalue())
    convert.convert_torch_file(tmp_path / "nan.pth", tmp_path / "folder")
    description = (tmp_path / "folder" / "cotnet.json").read_text()
    assert "NaN" not in description
    assert "metric" not in json.loads(description)["source"]


def test_unusable_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder .*/none; give a folder made by"
    ):
        loading.load(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a folder made by cotnet-convert"):
        loading.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match=r"has no config.json"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(WeightsError, match=r"config.json: .* damaged: data: must be a sec"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(WeightsError, match="No checkpoint"):
        loading.load(tmp_path)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_model_that_does_not_fit(torch_file, folder, place):
    with pytest.raises(WeightsError, match="cotnet50"):
        loading.load(torch_file if place == "file" else folder, model="cotnet50")


def test_what_a_model_cannot_have_is_said_before_anything_is_made(folder):
    with pytest.raises(ValueError, match=r"num_classes must be 0 or more, not 0\.5"):
        loading.load(folder, num_classes=0.5)


def test_new_classifier(folder, caplog):
    with caplog.at_level(logging.WARNING):
        model, variables = loading.load(folder, num_classes=7)
    assert "classifier of 10 classes is replaced by one of 7 with random weights" in caplog.text
    head = variables["params"]["head"]
    assert (head["kernel"].shape, head["bias"].shape) == ((512, 7), (7,))
    assert 0 < float(np.abs(head["kernel"]).max()) <= 512**-0.5
    assert output_shape(model, variables) == (1, 7)
    old = variables_of(2)
    del old["params"]["head"], variables["params"]["head"]
    assert equal(variables, old)


def test_a_new_classifier_of_the_same_length_by_its_seed(folder, caplog):
    def head(**options):
        _, variables = loading.load(folder, num_classes=CLASSES, **options)
        return variables["params"]["head"]

    with caplog.at_level(logging.WARNING):
        new = head(new_head=True, seed=1)
    assert "classifier of 10 classes is replaced by one of 10 with random weights" in caplog.text
    assert equal(head(new_head=True, seed=1), new)
    for other in (head(), head(new_head=True, seed=2)):
        assert not np.array_equal(other["kernel"], new["kernel"])
    # Names of other classes are no error then.
    assert equal(head(new_head=True, seed=1, class_names=list("abcdefghij")), new)


def test_no_classifier(folder, caplog):
    with caplog.at_level(logging.WARNING):
        model, variables = loading.load(folder, num_classes=0)
    assert "head" not in variables["params"]
    assert output_shape(model, variables) == (1, 512)
    caplog.clear()
    loading.load(folder, num_classes=CLASSES)
    assert not caplog.text, "the classifier is kept"


def test_attributes_and_dtypes(folder):
    model, variables = loading.load(
        folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, drop_rate=0.2
    )
    assert (model.dtype, model.drop_rate) == (jnp.bfloat16, 0.2)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}


def test_backbone(folder):
    backbone, variables = loading.load(folder, features_only=True, out_indices=(1, 2))
    expected = variables_of(2)
    for collection, modules in variables.items():
        assert set(modules) == {"stem", "stage1_block0", "stage2_block0"}
        assert equal(modules, {name: expected[collection][name] for name in modules})
    features = jax.eval_shape(backbone.apply, variables, IMAGE)
    assert [stage.shape for stage in features] == [(1, 16, 16, 64), (1, 8, 8, 128)]
    # The weights' own number of classes does not matter, nor does another one.
    assert equal(loading.load(folder, features_only=True, num_classes=7)[1], expected_backbone())


def expected_backbone():
    variables = variables_of(2)
    del variables["params"]["head"]
    return variables


@pytest.mark.parametrize(
    ("channels", "how"), [(1, "summed"), (4, "scaled by 3/4"), (6, "scaled by 3/6")]
)
def test_other_channels(folder, caplog, channels, how):
    with caplog.at_level(logging.WARNING):
        model, variables = loading.load(folder, in_channels=channels)
    assert f"weights, for 3 channels, are {'repeated and ' * (channels > 1)}{how}" in caplog.text
    assert f"in_channels={channels}" in caplog.text
    given = variables_of(2)["params"]["stem"]["conv1"]["kernel"]
    kernel = variables["params"]["stem"]["conv1"].pop("kernel")
    assert kernel.shape == (*given.shape[:2], channels, given.shape[3])
    if channels == 1:
        np.testing.assert_allclose(kernel[:, :, 0], given.sum(2), rtol=1e-6, atol=1e-7)
    for channel in range(channels if channels > 1 else 0):
        np.testing.assert_allclose(
            kernel[:, :, channel], given[:, :, channel % 3] * 3 / channels, rtol=1e-6
        )
    assert model.default_cfg["input_size"] == (32, 32, channels)
    # Nothing else is changed.
    others = variables_of(2)
    del others["params"]["stem"]["conv1"]["kernel"]
    assert equal(variables, others)


def test_the_weights_own_channels_are_left_alone(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert equal(loading.load(folder, in_channels=3)[1], variables_of(2))
    assert not caplog.text
