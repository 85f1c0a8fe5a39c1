"""Weights of kecam's CoTNets in Keras's HDF5 files. goldens/keras_weights are by that project."""

import json
import sys

import jax
import numpy as np
import pytest
from helpers import golden
from helpers import keras_file_builder as build
from helpers.tiny_runs import equal

import cotnet_jax
from cotnet_jax.weights import convert, keras_file, keras_name_map, loading, name_map
from cotnet_jax.weights.folder import WeightsError

h5py = pytest.importorskip("h5py")
FOLDER = golden.GOLDENS / "keras_weights"


def shapes_of(model):
    return json.loads((FOLDER / f"{model}.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return build.weights(shapes_of("cotnet_tiny"))


@pytest.fixture(scope="module")
def path(tmp_path_factory, arrays):
    return build.write(tmp_path_factory.mktemp("keras") / "tiny.h5", arrays)


def test_logits_are_those_of_kecams_own_network(path):
    model, variables = cotnet_jax.load(path)
    logits = jax.jit(model.apply)(variables, build.images())
    expected = np.load(FOLDER / "cotnet_tiny.npz")["logits"]
    assert golden.relative_error(logits, expected) < 1e-5


def test_taps_and_channels_of_the_attention_weights(path, arrays):
    """A permutation that both ways of a round trip share would go unnoticed."""
    found = loading.read_weights(path).variables["params"]["stage2_block0"]["cot"]
    layer = "stack2_block1_deep_2_cot_embed_ww_2_conv"
    theirs = arrays[f"{layer}/{layer}/kernel:0"]
    ours = found["weight_conv2"]["kernel"].reshape(16, 9, 4)
    assert np.array_equal(ours[5, 7, 2], theirs.reshape(16, 4, 9)[5, 2, 7])
    layer = "stack2_block1_deep_2_cot_embed_ww_group_norm"
    scale = arrays[f"{layer}/{layer}/gamma:0"]
    assert found["weight_norm"]["scale"][7 * 4 + 2] == scale[2 * 9 + 7]


def test_arrays_are_pytorchs_transposed(path, arrays):
    """As that project's own conversion from PyTorch leaves them."""
    variables = loading.read_weights(path).variables
    torch = name_map.to_torch_state_dict("cotnet_tiny", variables, num_classes=10)
    for theirs, layer in (
        ("layer3.0.conv2.embed.3.weight", "stack3_block1_deep_2_cot_embed_ww_2_conv"),
        ("layer3.0.conv2.key_embed.0.weight", "stack3_block1_deep_2_cot_key_conv"),
    ):
        kernel = arrays[f"{layer}/{layer}/kernel:0"]
        assert np.array_equal(torch[theirs].transpose(2, 3, 1, 0), kernel)
    norm = "stack3_block1_deep_2_cot_embed_ww_group_norm"
    assert np.array_equal(torch["layer3.0.conv2.embed.4.bias"], arrays[f"{norm}/{norm}/beta:0"])


@pytest.mark.parametrize(
    ("model", "theirs"), [("cotnet50", "cotnet50"), ("se_cotnetd_50", "cotnet_se50d")]
)
def test_names_and_shapes_are_that_projects(model, theirs):
    expected = {
        f"{name.partition('/')[0]}/{name.rpartition('/')[2].removesuffix(':0')}": tuple(shape)
        for name, shape in shapes_of(theirs).items()
    }
    assert keras_name_map.keras_shapes(model, num_classes=10) == expected
    assert keras_name_map.matching_models(expected) == [model]


def test_whole_models_long_lists_and_other_floats(tmp_path, arrays, path):
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    whole = loading.read_weights(
        build.write(tmp_path / "whole.keras2", halves, whole=True, chunks=3)
    )
    assert whole.model == "cotnet_tiny" and whole.num_classes == 10
    assert (whole.kind, whole.source["format"]) == ("raw", "Keras HDF5")
    kernel = whole.variables["params"]["head"]["kernel"]
    assert kernel.dtype == np.float32
    assert np.array_equal(kernel, halves["predictions/predictions/kernel:0"].astype(np.float32))
    without = {name: array for name, array in arrays.items() if "predictions" not in name}
    assert loading.read_weights(build.write(tmp_path / "b.h5", without)).num_classes == 0


def test_convert_takes_it(tmp_path, path, capsys, monkeypatch):
    # Other tests convert with the forward pass, which takes seconds to compile.
    monkeypatch.setattr(convert, "_compile_forward_pass", lambda *_: lambda _: np.zeros(1))
    convert.convert_torch_file(path, tmp_path / "converted")
    assert "Keras HDF5" in capsys.readouterr().out
    first, second = (loading.read_weights(each) for each in (path, tmp_path / "converted"))
    assert equal(first.variables, second.variables)
    convert.convert_to_torch(path, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no ema weights that are marked so"):
        loading.read_weights(path, kind="ema")


def test_weights_that_do_not_fit_are_listed_by_kerass_names(tmp_path, arrays):
    changed = dict(arrays)
    kernel = changed.pop("stack1_block1_deep_3_conv/stack1_block1_deep_3_conv/kernel:0")
    changed["stack1_block1_deep_4_conv/stack1_block1_deep_4_conv/kernel:0"] = kernel
    changed["stem_bn/stem_bn/beta:0"] = np.zeros(7, np.float32)
    path = build.write(tmp_path / "x.h5", changed)
    with pytest.raises(WeightsError) as error:
        loading.read_weights(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: does not fit 'cotnet_tiny', 3 problems:"
    assert lines[1].endswith(
        "missing: stack1_block1_deep_3_conv/kernel (nearest: stack1_block1_deep_4_conv/kernel)"
    )
    assert "misshapen: stem_bn/beta is (7,), should be (32,)" in lines[3]
    with pytest.raises(WeightsError, match="not those of a CoTNet of keras_cv"):
        loading.read_weights(build.write(tmp_path / "y.h5", {"dense/dense/kernel:0": np.ones(3)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_are_checked(tmp_path, arrays, value):
    name = "stem_bn/stem_bn/moving_variance:0"
    spoilt = arrays[name].copy()
    spoilt[3] = value
    path = build.write(tmp_path / "x.h5", arrays | {name: spoilt})
    with pytest.raises(WeightsError, match=r"x.h5: .*\n.*stem_bn/moving_variance: 1 of 32"):
        loading.read_weights(path)


def hostile(kind, file, other):
    """Spoil the array "a/a/kernel:0" of an open file."""
    group = file["a/a"]
    del group["kernel:0"]
    if kind == "external link":
        group["kernel:0"] = h5py.ExternalLink(str(other), "/a/a/kernel:0")
    elif kind == "soft link":
        group["kernel:0"] = h5py.SoftLink("/b/b/kernel:0")
    elif kind == "external values":
        group.create_dataset("kernel:0", (4,), "f4", external=[(str(other), 0, 16)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(str(other), "a/a/kernel:0", (4,))
        group.create_virtual_dataset("kernel:0", layout)
    elif kind == "compressed":
        group.create_dataset("kernel:0", (2**26,), "f4", compression="gzip", chunks=(2**20,))
    elif kind == "huge":
        group.create_dataset("kernel:0", (2**40,), "f4", chunks=(2**16,))
    elif kind == "objects":
        group.create_dataset("kernel:0", data=[b"x"], dtype=h5py.string_dtype())
    elif kind == "circle":
        group["kernel:0"] = file
    elif kind == "integers":
        group.create_dataset("kernel:0", data=[1, 2])
    elif kind == "many":
        for index in range(keras_file._MOST_NAMES):
            group[str(index)] = file["b/b/kernel:0"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external link", "is a link to elsewhere"),
        ("soft link", "is a link to elsewhere"),
        ("external values", "are in another file"),
        ("virtual", "are in another file"),
        ("compressed", "is compressed: write the file again by"),
        ("huge", "claim more bytes"),
        ("objects", "is object, which is not a floating-point type"),
        ("circle", "lies too deep"),
        ("integers", "is int64, which is not a floating-point type"),
        ("many", "more than 200 groups and arrays"),
    ],
)
def test_hostile_files(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(keras_file, "_MOST_NAMES", 200)
    values = {f"{layer}/{layer}/kernel:0": np.ones(4, np.float32) for layer in "ab"}
    other = build.write(tmp_path / "other.h5", values)
    path = build.write(tmp_path / "x.h5", values)
    with h5py.File(path, "r+") as file:
        hostile(kind, file, other)
    with pytest.raises(WeightsError, match=message) as error:
        keras_file.read_keras_file(path)
    assert str(error.value).startswith(f"{path}: ")


def test_damaged_and_other_files(tmp_path, path):
    data = path.read_bytes()
    torn = tmp_path / "torn.h5"
    for size in (8, 100, 1000, len(data) // 2, len(data) - 1):
        torn.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"torn.h5: damaged \("):
            loading.read_weights(torn)
    torn.write_text("no HDF5")
    with pytest.raises(ValueError, match=r"torn.h5: neither a file .*, nor HDF5"):
        loading.read_weights(torn)
    with h5py.File(tmp_path / "new.h5", "w") as file:
        file.create_group("layers/conv2d/vars")["0"] = [1.0]
    with pytest.raises(WeightsError, match="as Keras 3 writes them"):
        loading.read_weights(tmp_path / "new.h5")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["images"] = [1.0]
    with pytest.raises(WeightsError, match="none of Keras's weights"):
        loading.read_weights(tmp_path / "data.h5")


@pytest.mark.slow
def test_files_with_changed_bytes_end_with_arrays_or_one_error(tmp_path):
    values = {f"{layer}/{layer}/kernel:0": np.ones((3, 4), np.float32) for layer in "abcdef"}
    data = build.write(tmp_path / "whole.h5", values, chunks=2).read_bytes()
    random = np.random.RandomState(1)
    path = tmp_path / "changed.h5"
    for _ in range(4000):
        changed = bytearray(data)
        for _ in range(random.randint(1, 6)):
            at = random.randint(len(data))
            bit = changed[at] ^ (1 << random.randint(8))
            changed[at] = random.choice([0, 255, random.randint(256), bit])
        path.write_bytes(changed)
        try:
            keras_file.read_keras_file(path)
        except WeightsError as error:
            assert str(error).startswith(f"{path}: ")


def test_without_h5py(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(WeightsError, match=r'tiny.h5: .*type pip install "h5py"'):
        cotnet_jax.load(path)
