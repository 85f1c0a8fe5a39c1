"""What people really save: wrappers' names, EMA, counters, logs, shards, unsupported kinds."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import golden
from helpers import torch_file_builder as build

from cotnet_jax.weights import convert, loading, name_map, torch_files
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files import TorchFileError

CLASSES = 10
TINY = name_map.torch_shapes("cotnet_tiny", num_classes=CLASSES)


def tiny(seed=1):
    return golden.state_dict(TINY, seed)


@pytest.fixture(scope="module")
def expected():
    return {seed: name_map.from_torch_state_dict("cotnet_tiny", tiny(seed)) for seed in (1, 2)}


def equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def write(folder, raw, ema=None, name="w.pth"):
    path = folder / name
    path.write_bytes(build.training_checkpoint(raw, ema, prefix=""))
    return path


def report(read):
    return "\n".join(read.notes)


# ---------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda n: f"_orig_mod.{n}", ["_orig_mod."]),
        (lambda n: f"module.module.{n}", ["module."]),
        (lambda n: f"module._orig_mod.{n}", ["module.", "_orig_mod."]),
        (lambda n: f"_orig_mod.module.{n}", ["module.", "_orig_mod."]),
        (lambda n: f"model.{n}", ["model."]),
        (lambda n: f"backbone.{n}", ["backbone."]),
        # Not in the issue that asked for this:
        (lambda n: f"module.student.net.{n}", ["module.", "student.net."]),
        (lambda n: f"model._orig_mod.{n}", ["model.", "_orig_mod."]),
        (lambda n: n.replace("layer1.", "layer1._orig_mod."), ["_orig_mod."]),
        (lambda n: f"_fsdp_wrapped_module.{n}", ["_fsdp_wrapped_module."]),
        (lambda n: n.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."), ["_checkpoint"]),
        (lambda n: n if n.startswith("fc.") else f"backbone.{n}", ["backbone."]),
    ],
)
def test_prefixes(tmp_path, expected, rename, told):
    path = write(tmp_path, {rename(name): value for name, value in tiny().items()})
    read = loading.read_weights(path)
    assert equal(read.variables, expected[1])
    line = next(note for note in read.notes if note.startswith("prefixes  "))
    assert all(prefix in line for prefix in told)


def test_no_prefix_is_not_told(tmp_path):
    assert "prefixes" not in report(loading.read_weights(write(tmp_path, tiny())))


def test_tensors_beside_a_prefixed_network(tmp_path, expected):
    state_dict = {f"model.{name}": value for name, value in tiny().items()}
    state_dict["loss.weight"] = np.ones(CLASSES, np.float32)
    read = loading.read_weights(write(tmp_path, state_dict))
    assert equal(read.variables, expected[1])
    assert "tensors outside of 'model.': loss.weight" in report(read)


def test_several_networks_are_refused(tmp_path):
    state_dict = {f"student.{name}": value for name, value in tiny(1).items()}
    state_dict |= {f"teacher.{name}": value for name, value in tiny(2).items()}
    with pytest.raises(WeightsError, match=r"2 networks.*'student.', 'teacher.': save"):
        loading.read_weights(write(tmp_path, state_dict))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_names_with_and_without_a_prefix(tmp_path, prefix):
    state_dict = {prefix + name: value for name, value in tiny(1).items()}
    state_dict["fc.weight"] = np.zeros((CLASSES, 512), np.float32)
    with pytest.raises(ValueError, match=r"with and without '.*fc.weight|fc.weight occurs"):
        loading.read_weights(write(tmp_path, state_dict))


def test_a_prefixed_network_that_does_not_fit(tmp_path):
    state_dict = {f"model.{name}": value for name, value in tiny().items()}
    state_dict["head.weight"] = state_dict.pop("model.fc.weight")
    with pytest.raises(WeightsError, match=r"missing: fc.weight(.|\n)*begin with 'model.'"):
        loading.read_weights(write(tmp_path, state_dict), model="cotnet_tiny")


# ---------------------------------------------------------------------------------------- counters


def test_averaged_model(tmp_path, expected):
    state_dict = {f"module.{name}": value for name, value in tiny().items()}
    path = tmp_path / "swa.safetensors"
    torch_files.write_safetensors(path, state_dict | {"n_averaged": np.int64(7)})
    read = loading.read_weights(path)
    assert equal(read.variables, expected[1])
    assert read.kind == "ema"
    assert "left out  1 counters: n_averaged" in report(read)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_scalars_of_profilers(tmp_path, expected, prefix):
    state_dict = {prefix + name: value for name, value in tiny().items()}
    modules = {name.rpartition(".")[0] for name in state_dict}
    for module in modules:
        state_dict[f"{module}.total_ops"] = np.zeros(1, np.float64)
        state_dict[f"{module}.total_params"] = np.zeros(1, np.float64)
    state_dict[f"{prefix}total_ops"] = np.zeros(1, np.float64)
    read = loading.read_weights(write(tmp_path, state_dict))
    assert equal(read.variables, expected[1])
    assert f"left out  {2 * len(modules) + 1} counters: total_ops, total_params" in report(read)
    statistics = len(jax.tree.leaves(read.variables["batch_stats"]))
    assert f"mapped    {len(TINY) - statistics} arrays of parameters" in report(read)


# --------------------------------------------------------------------------------------------- EMA


def nested(tensors, storages, start):
    entries = {}
    for i, (name, value) in enumerate(tensors.items(), start):
        storages[str(i)] = np.ascontiguousarray(value).tobytes()
        entries[name] = build.tensor(str(i), value.shape)
    return build.dict_of(entries)


@pytest.mark.parametrize(
    ("raw", "ema", "inner"),
    [
        ("state_dict", "ema", None),
        ("model", "ema_state_dict", None),
        ("model_state_dict", "model_ema_state_dict", None),
        ("model", "model_ema", None),
        ("state_dict", "state_dict_ema", None),
        # Not in the issue that asked for this:
        ("model", "ema", "module"),
        ("model", "ema", "shadow"),
        ("net", "ema_model", "state_dict"),
        ("params", "params_ema", None),
    ],
)
def test_keys_of_the_ema(tmp_path, raw, ema, inner):
    storages = {}
    of_raw = nested({"w": np.zeros(2, np.float32)}, storages, 0)
    of_ema = nested({"w": np.ones(2, np.float32)}, storages, 1)
    if inner:
        of_ema = build.dict_of({"decay": build.number(1), inner: of_ema})
    path = tmp_path / "w.pth"
    path.write_bytes(build.zip_file(build.dict_of({raw: of_raw, ema: of_ema}), storages))
    checkpoint = torch_files.read_torch_checkpoint(path)
    assert (checkpoint.kind, checkpoint.available) == ("ema", ("raw", "ema"))
    assert checkpoint.arrays()["w"].tolist() == [1, 1]
    assert torch_files.read_torch_checkpoint(path, "raw").arrays()["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("key", "inner", "kind"),
    [
        ("module", None, "raw"),
        ("weights", None, "raw"),
        ("generator", "state_dict", "raw"),
        ("net_ema", None, "ema"),
    ],
)
def test_the_only_state_dict_under_any_key(tmp_path, key, inner, kind):
    """As DeepSpeed and others name it."""
    storages = {}
    entries = nested(tiny(), storages, 0)
    entries = build.dict_of({inner: entries}) if inner else entries
    optimizer = build.dict_of({"state": build.dict_of({})})
    path = tmp_path / "w.pth"
    path.write_bytes(
        build.zip_file(build.dict_of({"optimizer": optimizer, key: entries}), storages)
    )
    read = loading.read_weights(path)
    assert read.kind == kind
    assert equal(read.variables, name_map.from_torch_state_dict("cotnet_tiny", tiny()))
    assert f"weights   {kind}, {len(tiny())} tensors of '{key}'" in report(read)


def test_several_state_dicts_are_listed(tmp_path):
    storages = {}
    found = {
        name: nested({"w": np.ones(2, np.float32)}, storages, i)
        for i, name in enumerate(("student", "teacher"))
    }
    path = tmp_path / "w.pth"
    path.write_bytes(build.zip_file(build.dict_of(found), storages))
    words = r"has 2 state dicts, student \(dict of 1\), teacher \(dict of 1\): save the one"
    with pytest.raises(TorchFileError, match=words):
        torch_files.read_torch_checkpoint(path)


# ------------------------------------------------------------------------------- unsupported kinds


def quantised(key):
    arguments = [build.storage(key, 2, "QInt8Storage"), build.number(0)]
    arguments += [build.tuple_of(build.number(2)), build.tuple_of(build.number(1))]
    arguments += [build.tuple_of(build.name("torch", "per_tensor_affine")), b"\x89", b")"]
    return build.name("torch._utils", "_rebuild_qtensor") + build.tuple_of(*arguments) + b"R"


def sparse(key):
    layout = build.name("torch.serialization", "_get_layout")
    layout += build.tuple_of(build.text("torch.sparse_coo")) + b"R"
    parts = build.tuple_of(*(build.tensor(key, (2,), kind="CharStorage"),) * 2, b")", b"N")
    return (
        build.name("torch._utils", "_rebuild_sparse_tensor") + build.tuple_of(layout, parts) + b"R"
    )


def sparse_parameter(key):
    function = build.name("torch._utils", "_rebuild_parameter")
    return function + build.tuple_of(sparse(key), b"\x88", b")") + b"R"


def lacking_dtype(key):
    function = build.name("torch._utils", "_rebuild_tensor_v3")
    shape = build.tuple_of(build.number(2)), build.tuple_of(build.number(1))
    storage = build.storage(key, 2, "UntypedStorage")
    dtype = build.name("torch", "float4_e2m1fn_x2")
    return function + build.tuple_of(storage, build.number(0), *shape, b"\x89", b")", dtype) + b"R"


def conjugated(key):
    tensor = build.tensor(key, (2,), kind="CharStorage")
    return tensor[:-2] + build.dict_of({"conj": b"\x88"}) + b"tR"


UNSUPPORTED = {
    "a quantised tensor": quantised,
    "a sparse tensor": sparse,
    # Not in the issue that asked for this:
    "a sparse tensor, as a parameter": sparse_parameter,
    "a tensor of a dtype that NumPy lacks": lacking_dtype,
    "a conjugated or negated tensor": conjugated,
}


def with_unsupported(folder, name, make):
    storages = {}
    state_dict = tiny()
    state_dict.pop(name, None)
    entries = nested(state_dict, storages, 0)
    storages["odd"] = bytes(2)
    opcodes = entries[:-1] + build.text(name) + make("odd") + b"u"
    path = folder / "w.pth"
    path.write_bytes(build.zip_file(build.dict_of({"state_dict": opcodes}), storages))
    return path


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_tensor_beside_good_weights(tmp_path, expected, kind):
    path = with_unsupported(tmp_path, "calibration.histogram", UNSUPPORTED[kind])
    read = loading.read_weights(path)
    assert equal(read.variables, expected[1])
    assert "left out  calibration.histogram" in report(read)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_tensor_that_is_needed(tmp_path, kind):
    path = with_unsupported(tmp_path, "layer1.0.bn1.weight", UNSUPPORTED[kind])
    with pytest.raises(WeightsError) as error:
        loading.read_weights(path)
    what = kind.partition(",")[0]
    assert f"unsupported: layer1.0.bn1.weight is {what}" in str(error.value)
    assert "dequantize" in str(error.value)
    assert "missing" not in str(error.value)


def test_network_of_unsupported_tensors_alone(tmp_path):
    path = tmp_path / "w.pth"
    entries = {"layer1.0.conv1.weight": quantised("odd"), "fc.weight": quantised("odd")}
    path.write_bytes(build.zip_file(build.dict_of(entries), {"odd": bytes(2)}))
    with pytest.raises(WeightsError, match=r"fc.weight is a quantised tensor(.|\n)*dequantize"):
        loading.read_weights(path)


def test_legacy_file_with_a_quantised_tensor(tmp_path):
    storages = {"0": np.ones(2, np.float32), "1": np.ones(2, np.int8)}
    odd = quantised("1").replace(build.number(2) + b"tQ", build.number(2) + b"NtQ")
    value = build.dict_of({"w": build.tensor("0", (2,), view=True), "q": odd})
    path = tmp_path / "w.pth"
    path.write_bytes(build.legacy_file(value, storages))
    checkpoint = torch_files.read_torch_checkpoint(path)
    assert checkpoint.arrays()["w"].tolist() == [1, 1]
    assert checkpoint.unsupported == {"q": "a quantised tensor"}


# -------------------------------------------------------------------------------------------- logs


def floats(count):
    return b"".join(b"G" + struct.pack(">d", i / 7) for i in range(count))


def numbered(first):
    steps = (b"J" + struct.pack("<i", 50 * i) + b"G" + bytes(8) for i in range(first, first + 1000))
    return b"(" + b"".join(steps) + b"u"


LOGS = {
    "a list": lambda n: b"](" + floats(n) + b"e",
    # Not in the issue that asked for this:
    "batches of a list": lambda n: b"]" + (b"(" + floats(1000) + b"e") * (n // 1000),
    "a dictionary by step": lambda n: b"}" + b"".join(numbered(i) for i in range(0, n, 1000)),
    "dictionaries": lambda n: build.text("loss") + b"q\x00" + build.text("step") + b"q\x01"
    + b"](" + (b"}(h\x00G" + bytes(8) + b"h\x01J" + bytes(4) + b"u") * (n // 2) + b"e" + b"\x87",
    "flags": lambda n: b"](" + b"\x88" * n + b"e",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("a list", "dictionaries") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in LOGS
    ],
)
def test_log_of_600000_numbers(tmp_path, kind):
    weights = build.dict_of({"w": build.tensor("0", (2,))})
    value = build.dict_of({"model": weights, "log": LOGS[kind](600_000)})
    path = tmp_path / "w.pth"
    path.write_bytes(build.zip_file(value, {"0": bytes(8)}))
    assert torch_files.read_torch_checkpoint(path).arrays()["w"].shape == (2,)


# ------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        # Not in the issue that asked for this:
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
        ("BF16", ml_dtypes.bfloat16),
    ],
)
def test_dtypes_that_numpy_lacks(tmp_path, stored, dtype):
    values = np.array([0.5, -1.5, 2, 0], dtype)
    header = {"w": {"dtype": stored, "shape": [2, 2], "data_offsets": [0, values.nbytes]}}
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    array = torch_files.read_torch_checkpoint(path).arrays()["w"]
    assert array.dtype == dtype
    assert array.astype(np.float32).tolist() == [[0.5, -1.5], [2, 0]]


def test_float8_weights(tmp_path):
    entries, data = {}, b""
    half = {name: value.astype(ml_dtypes.float8_e4m3fn) for name, value in tiny().items()}
    for name, value in half.items():
        place = [len(data), len(data) + value.nbytes]
        entries[name] = {"dtype": "F8_E4M3", "shape": value.shape, "data_offsets": place}
        data += value.tobytes()
    text = json.dumps(entries).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    read = loading.read_weights(path)
    assert equal(read.variables, name_map.from_torch_state_dict("cotnet_tiny", half))


def shards(folder, state_dict, count=3):
    folder.mkdir(exist_ok=True)
    places = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(state_dict.items())[i::count])
        torch_files.write_safetensors(folder / file, part, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("given", ["index", "folder"])
def test_shards(tmp_path, expected, given, capsys, monkeypatch):
    index = shards(tmp_path / "hub", tiny())
    path = index if given == "index" else index.parent
    read = loading.read_weights(path)
    assert equal(read.variables, expected[1])
    assert "safetensors format in 3 shards" in report(read)
    monkeypatch.setattr(convert, "_compile_forward_pass", lambda *_: lambda _: np.zeros(CLASSES))
    convert.convert_torch_file(path, tmp_path / "jax")
    assert equal(loading.read_weights(tmp_path / "jax").variables, expected[1])


def test_damaged_shards(tmp_path):
    index = shards(tmp_path / "hub", {"w": np.ones(2), "v": np.ones(2), "u": np.ones(2)})
    good = index.read_text()
    second = index.parent / "model-00002-of-00003.safetensors"
    for text, message in (
        (good.replace("00002-of", "00009-of"), "shard model-00009-of-00003.safetensors is missing"),
        (good.replace('"w"', '"x"'), "lacks 1 tensors that the index promises, such as x"),
        (good.replace("model-00002", "../model-00002"), "not a name"),
        (good.replace("model-00002", "/model-00002"), "not a name"),
        (good.replace("00002-of-00003.safetensors", "2.bin"), "is no shard"),
        (good.replace("model-00002", "m" * 300), "shard m+.* is missing"),
        (good[:-5], "the index is damaged"),
        ("{}", "without weight_map"),
        ("[]", "not a dictionary"),
    ):
        index.write_text(text)
        with pytest.raises(TorchFileError, match=message):
            torch_files.read_torch_checkpoint(index.parent)
    index.write_text(good)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(TorchFileError, match=r"00002-of-00003.safetensors: .*download complete"):
        torch_files.read_torch_checkpoint(index)
    (index.parent / "b.safetensors.index.json").write_text(good)
    with pytest.raises(TorchFileError, match="several indexes of shards, give one"):
        torch_files.read_torch_checkpoint(index.parent)
