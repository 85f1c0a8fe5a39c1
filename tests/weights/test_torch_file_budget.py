"""The budget of a reading: hostile files are refused soon, and only by the reader's own error."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from helpers import golden
from helpers import torch_file_builder as build
from helpers.torch_file_fuzz import MOST_SECONDS, memory

from cotnet_jax.weights import loading, name_map, torch_files
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files import Limits, TorchFileError

TESTS = pathlib.Path(__file__).parents[1]
KEEP, GIVE = b"q\x00", b"h\x00"


def write(folder, data, name="file.pth"):
    path = folder / name
    path.write_bytes(data)
    return path


def read(path):
    return torch_files.read_torch_checkpoint(path).arrays()


def refused(path, message):
    """Check that a file is refused in little time and memory."""
    before = memory(reset_peak=True)
    start = time.process_time()
    with pytest.raises(TorchFileError, match=message) as error:
        read(path)
    seconds, grown = time.process_time() - start, memory() - before
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 5000
    assert seconds < MOST_SECONDS
    assert grown < 150 * 2**10


LONG = build.text("x" * 10**6) + KEEP + b"0"
CHAIN = build.name("a", "b") + b")R" * 30_000 + KEEP + b"0"
HOSTILE = {
    "a long text as module and name, many times": (
        LONG + b"(" + (GIVE + GIVE + build.STACK_GLOBAL) * 100 + b"l",
        "whose name has 2,000,000 characters",
    ),
    "chains of calls as keys": (
        CHAIN + b"}(" + (GIVE + b")RN") * 5000 + b"u",
        "no state dict in it; it holds <inert object of a.b>",
    ),
    "a key that holds a long text many times": (
        LONG + b"}((" + GIVE * 300 + b"tNu",
        "it holds tuple of 300",
    ),
    # Not in the issue that asked for this:
    "a long text as the name of a tensor's dtype": (
        LONG + b"(" + (build.text("torch") + GIVE + build.STACK_GLOBAL) * 100 + b"l",
        "whose name has 1,000,005 characters",
    ),
    "a key of bytes as long as the file": (
        b"}B" + struct.pack("<I", 2 * 10**6) + b"\0" * 2 * 10**6 + b"Ns",
        "it holds bytes",
    ),
    "ten thousand classes": (
        b"(" + b"".join(build.name("m", str(i)) for i in range(10_000)) + b"l",
        "more than 1,000 classes and functions",
    ),
    "one dictionary under many keys": (
        b"}("
        + b"".join(build.text(f"key {i}") + b"N" for i in range(5000))
        + b"u"
        + KEEP
        + b"0}("
        + b"".join(build.text(str(i)) + GIVE for i in range(50_000))
        + b"u",
        "steps",
    ),
    "one dictionary inside many": (
        b"}("
        + b"".join(build.text(f"key {i}") + b"N" for i in range(5000))
        + b"u"
        + KEEP
        + b"0}("
        + b"".join(
            build.text(str(i)) + b"}" + build.text("module") + GIVE + b"s" for i in range(30_000)
        )
        + b"u",
        "steps",
    ),
    "many keys": (
        b"}(" + b"".join(build.text(f"key {i}") + b"N" for i in range(50_000)) + b"u",
        "and 49980 more",
    ),
    "one tensor under many names": (
        build.tensor("0", (1,))
        + KEEP
        + b"0}("
        + b"".join(build.text(str(i)) + GIVE for i in range(80_000))
        + b"u",
        "steps",
    ),
    "a long tuple as the key of many dictionaries": (
        b"(" + b"K\x01" * 20_000 + b"t" + KEEP + b"0(" + (b"}" + GIVE + b"Ns") * 20_000 + b"l",
        "steps",
    ),
    "integers with the same hash, in small steps": (
        b"}"
        + b"".join(
            b"(" + b"".join(build.number((i + j) * (2**61 - 1)) + b"N" for j in (3, 4, 5)) + b"u"
            for i in range(0, 60_000, 3)
        ),
        "steps",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(tmp_path, case):
    opcodes, message = HOSTILE[case]
    refused(write(tmp_path, build.zip_file(opcodes, {"0": bytes(4)})), message)


# ---------------------------------------------------------------------------------------- arrays


def test_members_that_share_a_stream(tmp_path):
    """300 storages of 16 MiB in a file of 100 kB."""
    count, size = 300, 16 * 2**20
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        tensors = {f"w{i:03}": build.tensor(f"{i:03}", (size // 4,)) for i in range(count)}
        archive.writestr("a/data.pkl", b"\x80\x02" + build.dict_of(tensors) + build.STOP)
        for i in range(count):
            archive.writestr(f"a/data/{i:03}", bytes(size) if i == 0 else b"")
        first = archive.getinfo("a/data/000")
    data = bytearray(buffer.getvalue())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        if data[at + 46 :].startswith(b"a/data/"):
            data[at + 16 : at + 28] = struct.pack(
                "<III", first.CRC, first.compress_size, first.file_size
            )
            data[at + 42 : at + 46] = struct.pack("<I", first.header_offset)
        at = data.find(b"PK\x01\x02", at + 1)
    refused(write(tmp_path, data), "overlaps what follows it|compressed members claim")


def test_stored_members_that_overlap(tmp_path):
    data = bytearray(
        build.zip_file(
            build.dict_of({"a": build.tensor("0", (8,)), "b": build.tensor("1", (8,))}),
            {"0": bytes(32), "1": bytes(32)},
        )
    )
    # The first grows into the second.
    at = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 1)
    assert data[at + 46 :].startswith(b"archive/data/0")
    data[at + 20 : at + 28] = struct.pack("<II", 100, 100)
    refused(write(tmp_path, data), "data/0 overlaps what follows it")


def expanded(count, view):
    entries = {
        f"w{i}": build.tensor("0", (2**20 - i,), (0,), elements=1, view=view) for i in range(count)
    }
    return build.dict_of(entries)


@pytest.mark.parametrize("kind", ["legacy", "zip"])
def test_expanded_tensors(tmp_path, kind):
    if kind == "legacy":
        data = build.legacy_file(expanded(100, True), {"0": np.ones(1, np.float32)})
    else:
        data = build.zip_file(expanded(100, False), {"0": bytes(4)}, byteorder=b"big")
    refused(write(tmp_path, data), "its tensors claim 419,410,600 bytes")
    few = build.zip_file(expanded(3, False), {"0": bytes(4)})
    assert read(write(tmp_path, few))["w0"].shape == (2**20,)


def test_one_tensor_under_many_names(tmp_path):
    """They share one array, also in the legacy format, whose storages are not aligned."""
    value = build.tensor("0", (2**20,), view=True) + KEEP + b"0}("
    value += b"".join(build.text(f"w{i}") + GIVE for i in range(100)) + b"u"
    path = write(tmp_path, build.legacy_file(value, {"0": np.ones(2**20, np.float32)}))
    before = memory(reset_peak=True)
    arrays = read(path)
    assert memory() - before < 50 * 2**10
    assert len(arrays) == 100
    assert all(np.shares_memory(array, arrays["w0"]) for array in arrays.values())


def test_overlapping_tensors(tmp_path):
    """Others of the same storage do not."""
    count, elements = 300, 2**20
    entries = {
        f"w{i}": build.tensor("0", (elements - i,), elements=elements, view=True)
        for i in range(count)
    }
    data = build.legacy_file(build.dict_of(entries), {"0": np.ones(elements, np.float32)})
    refused(write(tmp_path, data), "its tensors claim")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_shared_member_is_checked_and_inflated_once(tmp_path, method):
    count, rows = 500, 2**12
    path = tmp_path / "shared.pth"
    value = np.random.default_rng(0).integers(0, 9, (count, rows)).astype(np.float32)
    entries = {
        f"w{i}": build.tensor("0", (rows,), offset=i * rows, elements=value.size)
        for i in range(count)
    }
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + build.dict_of(entries) + build.STOP)
        archive.writestr("a/data/0", value.tobytes())
    state_dict = torch_files.read_torch_checkpoint(path).state_dict
    start = time.process_time()
    for i in range(count):
        # One after the other, as the conversion does: none is kept.
        assert np.array_equal(state_dict[f"w{i}"].numpy(), value[i])
    assert time.process_time() - start < MOST_SECONDS


@pytest.mark.parametrize("kind", ["BoolStorage", "FloatStorage"])
def test_few_elements_of_a_large_storage(tmp_path, kind):
    """Only the elements are copied, not all between the first and the last."""
    elements = 2**23
    value = build.tensor("0", (2,), (elements - 1,), elements=elements, kind=kind)
    size = elements * (4 if kind == "FloatStorage" else 1)
    data = build.zip_file(build.dict_of({"w": value}), {"0": bytes(size)}, byteorder=b"big")
    tensor = torch_files.read_torch_checkpoint(write(tmp_path, data)).state_dict["w"]
    tracemalloc.start()
    try:
        assert tensor.numpy().tolist() == [0, 0]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(steps=20), "more than 20 steps"),
        (Limits(held_bytes=500), "more than 500 bytes of memory"),
        (Limits(pickle_bytes=10), "above 10"),
        (Limits(directory_bytes=10), "a directory of"),
        (Limits(array_bytes=0, array_factor=0), "its tensors claim 24 bytes"),
        (Limits(dimensions=1), "tuple of 1 at most"),
        (Limits(globals=0), "more than 0 classes"),
    ],
)
def test_limits_can_be_changed(tmp_path, limits, message):
    value = build.dict_of({"w": build.tensor("0", (2, 3)), "a": build.name("os", "system")})
    path = write(tmp_path, build.zip_file(value, {"0": bytes(24)}))
    assert read(path)["w"].shape == (2, 3)
    with pytest.raises(TorchFileError, match=message):
        torch_files.read_torch_checkpoint(path, limits=limits)


def test_raised_limits(tmp_path):
    opcodes, _ = HOSTILE["ten thousand classes"]
    path = write(
        tmp_path,
        build.zip_file(
            build.dict_of({"w": build.tensor("0", (1,)), "x": opcodes}), {"0": bytes(4)}
        ),
    )
    assert torch_files.read_torch_checkpoint(path, limits=Limits(globals=10_000)).state_dict


# ------------------------------------------------------------------------------------ exceptions


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", "f4"),
        ("DoubleStorage", "f8"),
        ("LongStorage", "i8"),
        ("HalfStorage", "f2"),
        ("BFloat16Storage", "bf"),
        ("ComplexFloatStorage", "c8"),
        ("BoolStorage", "?"),
    ],
)
def test_big_endian_tensors_of_any_size(tmp_path, shape, kind, dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bf" else dtype)
    values = (np.arange(6)[: int(np.prod(shape))] + 1).astype(dtype).reshape(shape)
    if dtype.kind == "c":
        values = np.asarray(values * (1 + 2j), dtype)
        stored = values.reshape(-1).view(np.float32).byteswap()
    elif dtype.itemsize == 1:
        stored = values
    else:
        stored = values.reshape(-1).view(f"u{dtype.itemsize}").byteswap()
    value = build.dict_of({"w": build.tensor("0", shape, elements=values.size, kind=kind)})
    data = build.zip_file(value, {"0": stored.tobytes()}, byteorder=b"big")
    array = read(write(tmp_path, data))["w"]
    assert array.dtype == dtype
    assert array.shape == shape
    np.testing.assert_array_equal(array, values)


def safetensors_file(header, size):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(shape=[0, 2**62], place=[0, 0])}, "integers >= 0"),
        ({"a": entry(shape=[1] * 100, place=[0, 4])}, "tuple of 32 at most"),
        # Not in the issue that asked for this:
        ({"a": entry(shape=[0, 2**40, 2**40], place=[0, 0])}, "empty tensor"),
        ({"a": entry(shape=[2**32, 2**32], place=[0, 8])}, "needs .* elements"),
        ({"a": entry(shape=[-2, -1])}, "integers >= 0"),
        ({"a": entry(shape=[2.0])}, "integers >= 0"),
        ({"a": entry(shape="2")}, "not a str"),
        ({"a": entry(shape=[3])}, "needs 3 elements, its storage has 2"),
        ({"a": entry(shape=[1])}, "has 4 bytes, the file 8"),
        ({"a": entry(place=[0, 2**70])}, "lies outside"),
        ({"a": entry(place=[8, 0])}, "lies outside"),
        ({"a": entry(place=[0, 8, 8])}, "lies outside"),
        ({"a": entry(), "b": entry()}, "shares bytes"),
        ({"a": entry(shape=[1], place=[4, 8])}, "follows bytes of no tensor"),
        ({"a": entry(shape=[1], place=[0, 4])}, "tensors have 4 bytes, the file 8"),
        ({"a": entry(dtype=["F32"])}, "has the dtype"),
        ({"a": {"dtype": "F32"}}, "entry of tensor a is damaged"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "metadata"),
        (b'{"a":1,"a":1}', "name twice"),
        (b'{"a":' + b"[" * 100_000, "header is damaged"),
        (b'{"a":' + b"9" * 10_000 + b"}", "header is damaged"),
        (b"{\xff}", "header is damaged"),
    ],
)
def test_odd_safetensors(tmp_path, header, message):
    refused(write(tmp_path, safetensors_file(header, 8), "w.safetensors"), message)


@pytest.mark.parametrize("name", ["layer1.{0}.conv2.key_embed.0.weight", "q{0}.weight"])
def test_many_unexpected_names(tmp_path, name):
    """Looking for the nearest of each took 18 seconds."""
    names = ["layer1.0.conv2.key_embed.0.weight", *(name.format(i) for i in range(1, 9900))]
    header = {name: entry(place=[8 * i, 8 * i + 8]) for i, name in enumerate(names)}
    path = write(tmp_path, safetensors_file(header, 8 * len(names)), "w.safetensors")
    before = time.process_time()
    with pytest.raises(WeightsError, match=r"unexpected: .*\(nearest: ") as error:
        loading.read_weights(path)
    assert time.process_time() - before < 9
    assert str(error.value).count("unexpected: ") > 9000


def tiny():
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=10)
    return golden.state_dict(shapes | {"bn1.num_batches_tracked": ()}, 0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fc.weight", ()),
        ("fc.weight", (10,)),
        ("fc.weight", (10, 512, 1)),
        ("fc.weight", (0, 512)),
        ("conv1.0.weight", ()),
        ("conv1.0.weight", (32, 0, 3, 3)),
        ("bn1.running_var", ()),
        ("layer1.0.conv2.conv1x1.0.weight", ()),
    ],
)
def test_misshapen_weights(tmp_path, name, shape):
    path = tmp_path / "w.safetensors"
    torch_files.write_safetensors(path, tiny() | {name: np.zeros(shape, np.float32)})
    with pytest.raises(WeightsError, match=r"misshapen: " + name):
        loading.read_weights(path, model="cotnet_tiny")
    with pytest.raises(WeightsError, match=name):
        loading.read_weights(path)


@pytest.mark.parametrize(
    "count", [np.complex64(5), np.inf, np.nan, -np.inf, np.int64(-1), 1e30, np.uint64(2**63)]
)
def test_counts_of_batches_that_are_none(tmp_path, count):
    path = tmp_path / "w.safetensors"
    torch_files.write_safetensors(path, tiny() | {"bn1.num_batches_tracked": np.asarray(count)})
    with pytest.raises(WeightsError, match=r"bn1.num_batches_tracked is .*, not a count"):
        loading.read_weights(path)


def test_counts_that_averaging_made_floats(tmp_path):
    path = tmp_path / "w.safetensors"
    torch_files.write_safetensors(path, tiny() | {"bn1.num_batches_tracked": np.full(1, 7.5)})
    assert loading.read_weights(path).batches == 7


# ---------------------------------------------------------------------------------------- fuzzing


def fuzz(count, seed):
    result = subprocess.run(
        [sys.executable, str(TESTS / "helpers/torch_file_fuzz.py"), str(count), str(seed)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert not report["bad"]
    assert report["most_mib"] < 200
    assert len(report["outcomes"]) == 8, "every format must be read and refused"
    return report


def test_fuzz():
    fuzz(600, 0)


@pytest.mark.slow
def test_fuzz_100000():
    print(fuzz(100_000, 1))
