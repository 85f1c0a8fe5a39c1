"""Reading of PyTorch files: the same tensors, nothing executed, damage noticed."""

import contextlib
import copyreg
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from helpers import torch_file_builder as build
from helpers.torch_file_fuzz import MOST_SECONDS

from cotnet_jax.weights import torch_files
from cotnet_jax.weights.torch_files.budget import LIMITS, Budget
from cotnet_jax.weights.torch_files.inert import InertGlobal, InertObject
from cotnet_jax.weights.torch_files.tensors import make_tensor

TESTS = pathlib.Path(__file__).parents[1]
FOLDER = TESTS / "goldens" / "torch_files"
ZIP, LEGACY = "training_checkpoint.pth.tar", "training_checkpoint_legacy.pth.tar"
BARE = "bare_state_dict.pth"


def expected(weights):
    with np.load(FOLDER / "expected.npz") as arrays:
        factor = {"raw": 1, "ema": 2}[weights]
        return {k: v * factor if (v := arrays[k]).dtype.kind == "f" else v for k in arrays.files}


def assert_same(arrays, wanted):
    assert list(arrays) == list(wanted)
    for name, value in wanted.items():
        dtype = ml_dtypes.bfloat16 if name == "bf16" else value.dtype
        assert arrays[name].dtype == dtype
        assert arrays[name].shape == value.shape
        np.testing.assert_array_equal(arrays[name].astype(value.dtype), value)


def write(folder, data, name="file.pth"):
    path = folder / name
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("name", [ZIP, LEGACY, BARE])
@pytest.mark.parametrize("weights", ["raw", "ema", None])
def test_every_tensor_of_torch_save(name, weights):
    if name == BARE and weights == "ema":
        with pytest.raises(torch_files.TorchFileError, match="no ema weights, only raw"):
            torch_files.read_torch_checkpoint(FOLDER / name, weights)
        return
    checkpoint = torch_files.read_torch_checkpoint(FOLDER / name, weights)
    taken = weights or ("raw" if name == BARE else "ema")
    assert checkpoint.kind == taken
    assert checkpoint.format == ("legacy" if name == LEGACY else "zip")
    assert_same(checkpoint.arrays(), expected(taken))


@pytest.mark.parametrize("name", [ZIP, LEGACY])
def test_configuration_objects_are_data(name):
    checkpoint = torch_files.read_torch_checkpoint(FOLDER / name)
    assert checkpoint.available == ("raw", "ema")
    assert (checkpoint.arch, checkpoint.epoch, checkpoint.metric) == ("cotnet50", 3, 81.3)
    assert checkpoint.inert == ("yacs.config.CfgNode",)
    file = torch_files.read_torch_file(FOLDER / name)
    assert isinstance(file.value["args"], InertObject)
    assert file.value["arch"].get("num_classes") == 1000
    assert file.value["optimizer"]["param_groups"]
    assert [line for line in checkpoint.left_out if line.startswith("optimizer")]


def test_views_share_their_storage():
    file = torch_files.read_torch_file(FOLDER / BARE)
    weight, bias = file.value["fc.weight"], file.value["fc.bias"]
    assert weight.storage is bias.storage
    assert not weight.numpy().flags.owndata, "tensors must be views of the memory map"
    assert not weight.numpy().flags.writeable


def test_no_torch_needed(tmp_path):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'yacs'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from cotnet_jax.weights import torch_files\n"
        f"c = torch_files.read_torch_checkpoint({str(FOLDER / ZIP)!r})\n"
        "print(len(c.arrays()), 'torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, check=True
    )
    assert result.stdout.split() == ["9", "False"]


def checkpoint_file(entries, kind="zip", **members):
    """A training checkpoint with one tensor and more entries, as bytes."""
    data = np.arange(6, dtype=np.float32)
    view = kind == "legacy"
    value = build.dict_of(
        {"state_dict": build.dict_of({"w": build.tensor("0", (2, 3), view=view)}), **entries}
    )
    if view:
        return build.legacy_file(value, {"0": data})
    return build.zip_file(value, {"0": data.tobytes()}, **members)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["module.w", "module.b"], None),
        (["w", "b"], None),
        (["module.w", "b"], None),
        (["module.w", "w"], "with and without 'module.': w"),
    ],
)
def test_prefix(tmp_path, names, problem):
    entries = {name: build.tensor(str(i), (2,)) for i, name in enumerate(names)}
    storages = {str(i): np.full(2, i, np.float32).tobytes() for i in range(len(names))}
    path = write(tmp_path, build.zip_file(build.dict_of(entries), storages))
    if problem:
        with pytest.raises(torch_files.TorchFileError, match=problem):
            torch_files.read_torch_checkpoint(path)
    else:
        arrays = torch_files.read_torch_checkpoint(path).arrays()
        assert {k: v[0] for k, v in arrays.items()} == {"w": 0, "b": 1}


@pytest.mark.parametrize("arch", ["text", "dictionary", "object"])
def test_arch(tmp_path, arch):
    name = build.text("cotnet50")
    value = {
        "text": name,
        "dictionary": build.dict_of({"name": name}),
        "object": build.name("argparse", "Namespace")
        + build.EMPTY_TUPLE
        + build.NEWOBJ
        + build.dict_of({"name": name})
        + build.BUILD,
    }[arch]
    path = write(tmp_path, checkpoint_file({"arch": value}))
    assert torch_files.read_torch_checkpoint(path).arch == "cotnet50"


def test_empty_ema_is_none(tmp_path):
    path = write(tmp_path, checkpoint_file({"state_dict_ema": b"N"}))
    assert torch_files.read_torch_checkpoint(path).kind == "raw"


def test_no_state_dict_lists_contents(tmp_path):
    value = build.dict_of({"epoch": build.number(3), "optimizer": build.dict_of({})})
    path = write(tmp_path, build.zip_file(value))
    with pytest.raises(torch_files.TorchFileError) as error:
        torch_files.read_torch_checkpoint(path)
    assert str(error.value) == (
        f"{path}: no state dict in it; it holds epoch (int 3), optimizer (dict of 0)"
    )


def test_whole_model_is_explained(tmp_path):
    value = build.name("models.cotnet", "CoTNet") + build.EMPTY_TUPLE + build.NEWOBJ
    path = write(tmp_path, build.zip_file(value))
    with pytest.raises(torch_files.TorchFileError, match=r"models.cotnet.CoTNet.*state_dict\(\)"):
        torch_files.read_torch_checkpoint(path)


def test_big_endian(tmp_path):
    data = np.arange(6, dtype=">f4").tobytes()
    value = build.dict_of({"w": build.tensor("0", (3, 2), (1, 3))})
    path = write(tmp_path, build.zip_file(value, {"0": data}, byteorder=b"big"))
    array = torch_files.read_torch_checkpoint(path).arrays()["w"]
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3).T)


def test_deflated_members(tmp_path):
    source = io.BytesIO((FOLDER / ZIP).read_bytes())
    path = tmp_path / "deflated.pth"
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in sorted(old.infolist(), key=lambda info: info.header_offset):
            new.writestr(info.filename, old.read(info))
    assert_same(torch_files.read_torch_checkpoint(path).arrays(), expected("ema"))


def test_file_without_checksums(tmp_path):
    """torch.serialization.set_crc32_options(False) writes zeros."""
    path = write(tmp_path, checkpoint_file({}))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            for crc in (info.CRC.to_bytes(4, "little"),):
                data = data.replace(crc, bytes(4))
    path.write_bytes(data)
    assert torch_files.read_torch_checkpoint(path).arrays()["w"][1, 2] == 5


def test_python_2_ordered_dict(tmp_path):
    pair = build.MARK + build.text("w") + build.tensor("0", (2,)) + b"l"
    value = build.name("collections", "OrderedDict")
    value += build.tuple_of(build.MARK + pair + b"l") + build.REDUCE
    path = write(tmp_path, build.zip_file(value, {"0": bytes(8)}))
    assert torch_files.read_torch_checkpoint(path).state_dict["w"].shape == (2,)


def test_bytes_of_any_value_are_booleans(tmp_path):
    value = build.dict_of({"b": build.tensor("0", (4,), kind="BoolStorage")})
    path = write(tmp_path, build.zip_file(value, {"0": bytes([0, 1, 2, 255])}))
    array = torch_files.read_torch_checkpoint(path).arrays()["b"]
    assert array.view(np.uint8).tolist() == [0, 1, 1, 1]


# ------------------------------------------------------------------------------ malicious files


WATCHED = {"os.system", "subprocess.Popen", "exec", "compile", "import", "os.putenv", "open"}
watching = [None]


def _hook(event, arguments):
    if watching[0] is not None and event in WATCHED:
        watching[0].append((event, str(arguments)[:200]))


@pytest.fixture(scope="module")
def audit():
    """A context in which every import, execution and opening of a file is noted."""
    torch_files.read_torch_checkpoint(FOLDER / ZIP).arrays()
    torch_files.read_torch_checkpoint(FOLDER / LEGACY).arrays()
    # Python imports the codec of names in ZIP files with the first of them.
    b"a".decode("cp437")
    sys.addaudithook(_hook)

    @contextlib.contextmanager
    def watch():
        watching[0] = events = []
        try:
            yield events
        finally:
            watching[0] = None

    return watch


def attacks(command, code):
    """{name: (opcodes, names that must be reported)}: each runs when really unpickled."""
    system = build.name("os", "system")
    arguments = build.text(command) + build.TUPLE1
    evaluate = build.name("builtins", "eval") + build.text(code) + build.TUPLE1 + build.REDUCE
    mapped = build.name("builtins", "map") + system + build.MARK + build.text(command) + b"l"
    mapped += build.TUPLE2 + build.NEWOBJ + build.TUPLE1
    getattr_ = build.name("builtins", "getattr")
    namespace = build.name("types", "SimpleNamespace") + build.EMPTY_TUPLE
    stack_system = build.text("os") + build.text("system") + build.STACK_GLOBAL
    imported = build.name("builtins", "__import__") + build.text("os") + build.TUPLE1 + build.REDUCE
    attribute = getattr_ + imported + build.text("system") + build.TUPLE2 + build.REDUCE
    return {
        "os.system by REDUCE": (system + arguments + build.REDUCE, ["os.system"]),
        "eval by REDUCE": (evaluate, ["builtins.eval"]),
        "Python 2's eval": (
            b"\x80\x02" + evaluate.replace(b"builtins", b"__builtin__"),
            ["__builtin__.eval"],
        ),
        "exec": (
            build.name("builtins", "exec") + build.text(code) + build.TUPLE1 + build.REDUCE,
            ["builtins.exec"],
        ),
        "BUILD": (
            namespace
            + build.NEWOBJ
            + build.dict_of({"__setstate__": system})
            + build.BUILD
            + build.text(command)
            + build.BUILD,
            ["os.system", "types.SimpleNamespace"],
        ),
        "INST": (build.MARK + build.text(command) + b"ios\nsystem\n", ["os.system"]),
        "OBJ": (build.MARK + system + build.text(command) + build.OBJ, ["os.system"]),
        "NEWOBJ": (
            build.name("builtins", "tuple") + mapped + build.NEWOBJ,
            ["builtins.tuple", "builtins.map", "os.system"],
        ),
        "NEWOBJ_EX": (
            build.name("builtins", "tuple") + mapped + build.EMPTY_DICT + build.NEWOBJ_EX,
            ["builtins.tuple", "builtins.map", "os.system"],
        ),
        "STACK_GLOBAL": (stack_system + arguments + build.REDUCE, ["os.system"]),
        "a dotted name": (
            b"\x80\x04"
            + build.text("shutil")
            + build.text("os.system")
            + build.STACK_GLOBAL
            + arguments
            + build.REDUCE,
            ["shutil.os.system"],
        ),
        "a getattr chain": (
            attribute + arguments + build.REDUCE,
            ["builtins.getattr", "builtins.__import__"],
        ),
        "a nested call": (
            build.name("builtins", "list")
            + build.MARK
            + system
            + arguments
            + build.REDUCE
            + b"l"
            + build.TUPLE1
            + build.REDUCE,
            ["builtins.list", "os.system"],
        ),
        "an argument of a set": (
            build.name("builtins", "set")
            + build.name("builtins", "map")
            + system
            + build.MARK
            + build.text(command)
            + b"l"
            + build.TUPLE2
            + build.REDUCE
            + build.TUPLE1
            + build.REDUCE,
            ["builtins.map", "os.system"],
        ),
        "an extension code": (b"\x82\xf0" + arguments + build.REDUCE, ["copyreg extension 240"]),
    }


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("attack", attacks("", ""))
def test_nothing_is_executed(tmp_path, audit, extension, attack, kind):
    mark = tmp_path / "executed"
    opcodes, names = attacks(f"echo > {mark}", f"open({str(mark)!r}, 'w').close()")[attack]
    # The attack is one: Python's own reader falls for it.
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\x04" + opcodes + build.STOP)
    assert mark.exists()
    mark.unlink()

    path = write(tmp_path, checkpoint_file({"args": opcodes}, kind))
    with audit() as events:
        checkpoint = torch_files.read_torch_checkpoint(path)
        checkpoint.arrays()
    assert [event[0] for event in events] == ["open"], "opens its file, and does nothing else"
    assert not mark.exists()
    assert set(names) <= set(checkpoint.inert)
    assert checkpoint.arrays()["w"].shape == (2, 3)


def test_names_of_inert_globals_are_printable(tmp_path):
    value = build.name("os", "\x1b[2Jsystem") + build.name("m", "x" * 1000) + build.TUPLE2
    path = write(tmp_path, checkpoint_file({"args": value}))
    names = torch_files.read_torch_checkpoint(path).inert
    assert all(name.isprintable() and len(name) <= 120 for name in names)


def test_names_of_tensors_are_printable(tmp_path):
    value = build.dict_of({"\x1b[2Jw": build.tensor("0", (2,))})
    path = write(tmp_path, build.zip_file(value, {"0": bytes(8)}))
    with pytest.raises(torch_files.TorchFileError, match=r"tensor called '\\x1b\[2Jw'"):
        torch_files.read_torch_checkpoint(path)


def test_inert_things_cannot_be_called():
    thing = InertGlobal("os.system")
    assert not callable(thing)
    assert not callable(InertObject(thing, ("true",)))


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        (build.text("storage"), "must be a tuple"),
        (build.EMPTY_TUPLE, "must be a tuple of 5"),
        (
            build.tuple_of(build.text("module"), *[build.name("os", "system")] * 4),
            "name a storage",
        ),
        (
            build.tuple_of(
                build.text("storage"), build.name("os", "system"), *[build.text("0")] * 3
            ),
            "unknown type",
        ),
        (
            build.tuple_of(
                build.text("storage"),
                build.name("torch", "FloatStorage"),
                build.name("os", "system"),
                build.text("cpu"),
                build.number(6),
            ),
            "key must be a short str",
        ),
        (build.storage("../version", 1)[:-1], "data/../version is missing"),
        (build.storage("0", 7)[:-1], "should have 28 bytes, has 24"),
        (build.storage("0", -1)[:-1], "impossible size"),
        (build.storage("0", 2**70)[:-1], "impossible size"),
        (build.storage("0", 6, "LongStorage")[:-1], "should have 48 bytes, has 24"),
    ],
)
def test_odd_persistent_ids(tmp_path, identifier, message):
    path = write(
        tmp_path, build.zip_file(build.dict_of({"w": identifier + build.PERSID}), {"0": bytes(24)})
    )
    with pytest.raises(torch_files.TorchFileError, match=message):
        torch_files.read_torch_checkpoint(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "message"),
    [
        ((7,), (1,), 0, "needs 7 elements, its storage has 6"),
        ((2, 3), (4, 1), 0, "needs 7 elements"),
        ((2,), (1,), 5, "needs 7 elements"),
        ((6,), (1,), -1, "integers >= 0"),
        ((6,), (-1,), 5, "integers >= 0"),
        ((2,), (2**47,), 0, "storage has 6"),
        ((6,), (1, 1), 0, "1 dimensions with 2 strides"),
        ((2**40,), (0,), 0, "repeats a storage"),
        ((2**30, 2**30), (0, 0), 0, "repeats a storage"),
        ((0, 2**30, 2**30), (0, 0, 0), 0, "empty tensor"),
        ((0,), (1,), 7, "empty tensor"),
        ((1,) * 33, (1,) * 33, 0, "tuple of 32 at most"),
    ],
)
def test_views_beyond_their_storage(tmp_path, shape, strides, offset, message):
    value = build.dict_of({"w": build.tensor("0", shape, strides, offset, elements=6)})
    path = write(tmp_path, build.zip_file(value, {"0": bytes(24)}))
    with pytest.raises(torch_files.TorchFileError, match=message):
        torch_files.read_torch_checkpoint(path)


def test_tensor_of_no_storage():
    with pytest.raises(torch_files.TorchFileError, match="of a str, not of a storage"):
        make_tensor("0", 0, (1,), (1,), Budget())


def run_script(name, *arguments):
    """The JSON that a script beside this file prints."""
    result = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        # What should be refused could run for ever.
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_bombs():
    """Each takes up to half a second of processor time on an idle core."""
    report = run_script("torch_file_bombs.py")
    assert set(report["refused"]) == set(report["seconds"])
    assert max(report["seconds"].values()) < MOST_SECONDS, report
    assert report["grown_mib"] < 200


@pytest.mark.slow
def test_large_bombs():
    """The largest pickles that are read: each takes up to a second on an idle core."""
    report = run_script("torch_file_bombs.py", 16 * 10**6)
    assert max(report["seconds"].values()) < 2, report
    assert report["grown_mib"] < 200


IMPOSSIBLE = (
    *(b"0", b"2", b"a", b"e", b"t", b"R", b"b", b"s", b"u", b"o", b"(o", b"Q", b"h\x00", b"\x93"),
    *(b"", b"(0t", b"N(R", b"N)R", b"NNb", b"NNa", b"N(Nu", b"}(Nu", b"(Nd", b"\x80\x09N", b"\x97"),
)


@pytest.mark.parametrize("opcodes", IMPOSSIBLE)
def test_impossible_opcodes(tmp_path, opcodes):
    path = write(tmp_path, build.zip_file(opcodes))
    with pytest.raises(torch_files.TorchFileError):
        torch_files.read_torch_checkpoint(path)


# -------------------------------------------------------------------------------- damaged files


def test_claimed_sizes_are_refused_before_allocating(tmp_path):
    value = build.dict_of({"w": build.tensor("0", (2**40,), view=True)})
    path = write(tmp_path, build.legacy_file(value, {"0": np.zeros(1, np.float32)}))
    with pytest.raises(torch_files.TorchFileError, match="claims 4,398,046,511,104 bytes"):
        torch_files.read_torch_checkpoint(path)


@pytest.mark.parametrize(
    ("elements", "tail", "message"),
    [
        (4, b"", "storage 0 has 6 elements, its tensors say 4"),
        (7, b"", "should end at byte .*; is the download complete"),
        (6, b"x", "1 bytes follow the last storage"),
    ],
)
def test_legacy_storages_of_other_sizes(tmp_path, elements, tail, message):
    value = build.dict_of({"w": build.tensor("0", (2,), elements=elements, view=True)})
    data = build.legacy_file(value, {"0": np.arange(6, dtype=np.float32)}) + tail
    with pytest.raises(torch_files.TorchFileError, match=message):
        torch_files.read_torch_checkpoint(write(tmp_path, data))


def test_legacy_arrays_are_aligned():
    """In the file they begin anywhere."""
    arrays = torch_files.read_torch_checkpoint(FOLDER / LEGACY).arrays()
    assert all(array.flags.aligned for array in arrays.values())


def test_zip_bomb(tmp_path):
    """50 MB of zeros in 50 KB."""
    elements = 50 * 2**18
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        value = build.dict_of({"w": build.tensor("0", (elements,))})
        archive.writestr("a/data.pkl", b"\x80\x02" + value + build.STOP)
        archive.writestr("a/data/0", bytes(4 * elements))
    with pytest.raises(torch_files.TorchFileError, match="claims 52,428,800 bytes in"):
        torch_files.read_torch_checkpoint(path)


def test_large_zip_directory(tmp_path):
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(LIMITS.directory_bytes // 1000):
            archive.writestr(f"a/{index}" + "x" * 1000, b"")
    with pytest.raises(torch_files.TorchFileError, match="directory of"):
        torch_files.read_torch_checkpoint(path)


def test_damaged_value_is_noticed(tmp_path):
    data = bytearray((FOLDER / ZIP).read_bytes())
    with zipfile.ZipFile(FOLDER / ZIP) as archive:
        info = archive.getinfo("training_checkpoint.pth/data/9")
    data[info.header_offset + 300] ^= 1
    path = write(tmp_path, data)
    torch_files.read_torch_checkpoint(path, "raw").arrays()
    with pytest.raises(torch_files.TorchFileError, match="data/9 does not fit its checksum"):
        torch_files.read_torch_checkpoint(path, "ema").arrays()


def test_exchanged_members_are_noticed(tmp_path):
    """The same checksums, in another place: only the file's fingerprint differs."""
    path = tmp_path / "swapped.pth"
    with zipfile.ZipFile(FOLDER / ZIP) as old, zipfile.ZipFile(path, "w") as new:
        members = {info.filename: old.read(info) for info in old.infolist()}
        root = "training_checkpoint.pth/data/"
        members[root + "0"], members[root + "9"] = members[root + "9"], members[root + "0"]
        for name, content in members.items():
            new.writestr(name, content)
    with pytest.raises(torch_files.TorchFileError, match="serialization_id"):
        torch_files.read_torch_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html>" + b"x" * 100, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b" + b"x" * 100, "gzip"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "tar archive"),
        (b'{"metadata": {}, "weight_map": {}}', r"of shards only those of safetensors are read"),
        (b"x" * 100, "neither"),
        (pickle.dumps({"a": 1}), "magic number is missing"),
        (b"PK\x03\x04" + b"x" * 100, "download complete"),
        (b"\x10\0\0\0\0\0\0\0{" + b"x" * 100, "header"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{" + b"x" * 100, "claims a header"),
    ],
)
def test_other_files_are_named(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(torch_files.TorchFileError, match=message) as error:
        torch_files.read_torch_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


def test_unpacked_folder_and_missing_file(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "data.pkl").write_bytes(b"")
    for unpacked in (tmp_path, tmp_path / "archive", tmp_path / "archive" / "data.pkl"):
        with pytest.raises(torch_files.TorchFileError, match="without unpacking it"):
            torch_files.read_torch_checkpoint(unpacked)
    (tmp_path / "empty").mkdir()
    with pytest.raises(torch_files.TorchFileError, match="a folder, not a file of PyTorch"):
        torch_files.read_torch_checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no file"):
        torch_files.read_torch_checkpoint(tmp_path / "missing.pth")


def test_npz_is_named(tmp_path):
    with pytest.raises(torch_files.TorchFileError, match=r"9 members \(conv1.weight.npy"):
        torch_files.read_torch_checkpoint(FOLDER / "expected.npz")


def mutations(count, seed):
    report = run_script("torch_file_mutations.py", count, seed)
    assert not report["bad"]
    assert not report["created"]
    assert report["grown_mib"] < 200
    assert sum(report["outcomes"].values()) == count
    assert len(report["outcomes"]) == 3, "the damage must be of every severity"
    return report


def test_mutations():
    mutations(400, 0)


@pytest.mark.slow
def test_5000_mutations():
    print(mutations(5000, 1))


# ----------------------------------------------------------------------------------- safetensors


def test_safetensors_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "transposed": rng.standard_normal((3, 4)).astype(np.float32).T,
        "strided": rng.standard_normal(10)[::2],
        "scalar": np.int64(1000),
        "half": rng.standard_normal(5).astype(np.float16),
        "bf16": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"an older file")
    torch_files.write_safetensors(path, arrays, {"model": "cotnet50"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    checkpoint = torch_files.read_torch_checkpoint(path)
    assert (checkpoint.format, checkpoint.kind) == ("safetensors", "raw")
    assert checkpoint.arch == "cotnet50"
    read = checkpoint.arrays()
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert checkpoint.state_dict[name].dtype == array.dtype
        assert checkpoint.state_dict[name].shape == read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


def test_safetensors_whose_size_looks_like_a_pickle(tmp_path):
    path = tmp_path / "w.safetensors"
    for padding in range(256):
        torch_files.write_safetensors(path, {"a": np.arange(3)}, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert torch_files.read_torch_checkpoint(path).arrays()["a"].tolist() == [0, 1, 2]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match="object"):
        torch_files.write_safetensors(path, {"a": np.array([object()])})
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    torch_files.write_safetensors(path, {"a": np.arange(4.0), "b": np.ones((2, 2), np.float16)})
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed[: rng.choice([len(data), rng.integers(len(data))])])
        try:
            torch_files.read_torch_checkpoint(path).arrays()
        except torch_files.TorchFileError:
            refused += 1
    assert 100 < refused < 300


# ------------------------------------------------------------- with PyTorch, where there is one


@pytest.mark.parametrize("legacy", [False, True])
def test_against_torch(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    tensors = {
        "base": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "expanded": torch.randn(1).expand(7),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    dtypes = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
    for dtype in dtypes.split():
        tensors[dtype] = torch.randn(5).mul(3).to(getattr(torch, dtype))
    if not legacy:
        tensors["uint16"] = torch.arange(5).to(torch.uint16)
        tensors["float8"] = torch.randn(5).to(torch.float8_e4m3fn)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "file.pth.tar"
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content | {"tensors": tensors}, path, _use_new_zipfile_serialization=not legacy)
    read = torch_files.read_torch_checkpoint(path)
    assert read.format == ("legacy" if legacy else "zip")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(read.arrays()[name], tensor.numpy())
    value = torch_files.read_torch_file(path).value
    momentum = value["optimizer"]["state"][0]["momentum_buffer"]
    np.testing.assert_array_equal(
        momentum, optimizer.state_dict()["state"][0]["momentum_buffer"].numpy()
    )
    for name, tensor in tensors.items():
        array = value["tensors"][name].numpy()
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert array.shape == tuple(tensor.shape)
        wide = array if array.dtype.kind == "c" else array.astype(np.float64)
        tensor = tensor.detach()
        wanted = tensor if tensor.dtype.is_complex else tensor.to(torch.float64)
        np.testing.assert_array_equal(wide, wanted.numpy())


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    torch_files.write_safetensors(tmp_path / "w.safetensors", {"a": array})
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.from_numpy(array.copy()))
