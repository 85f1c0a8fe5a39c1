"""Small PyTorch files, made by hand: good ones and ones that torch.save would never write."""

import io
import pickle
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STOP = b"."
REDUCE, BUILD, NEWOBJ, NEWOBJ_EX, MARK, OBJ = b"R", b"b", b"\x81", b"\x92", b"(", b"o"
STACK_GLOBAL, TUPLE1, TUPLE2, EMPTY_DICT, EMPTY_TUPLE, PERSID = (
    b"\x93",
    b"\x85",
    b"\x86",
    b"}",
    b")",
    b"Q",
)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return MARK + b"".join(values) + b"t"


def dict_of(entries: dict[str, bytes]) -> bytes:
    items = b"".join(text(key) + value for key, value in entries.items())
    return EMPTY_DICT + MARK + items + b"u"


def storage(key, elements, kind="FloatStorage", view=False) -> bytes:
    parts = [text("storage"), name("torch", kind), text(key), text("cpu"), number(elements)]
    return tuple_of(*parts, *([b"N"] if view else [])) + PERSID


def tensor(key, shape, strides=None, offset=0, elements=None, kind="FloatStorage", view=False):
    """Opcodes that make a tensor of storage ``key``, by default a contiguous one."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    elements = int(np.prod(shape)) if elements is None else elements
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + tuple_of(
            storage(key, elements, kind, view),
            number(offset),
            tuple_of(*map(number, shape)),
            tuple_of(*map(number, strides)),
            b"\x89",
            name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE,
        )
        + REDUCE
    )


def zip_file(value: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> bytes:
    """A file of torch.save in the zip format whose pickle is ``value``, opcodes without STOP."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + value + STOP)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for member, data in members.items():
            archive.writestr(f"archive/{member}", data)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def legacy_file(value: bytes, storages: dict[str, np.ndarray] | None = None) -> bytes:
    """A file of torch.save in the legacy format."""
    storages = storages or {}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(header, 2) for header in (MAGIC, 1001, system)]
    parts += [b"\x80\x02" + value + STOP, pickle.dumps(sorted(storages), 2)]
    for key in sorted(storages):
        parts += [struct.pack("<q", storages[key].size), storages[key].tobytes()]
    return b"".join(parts)


_STORAGE_OF_DTYPE = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "complex64": "ComplexFloatStorage",
}


def training_checkpoint(
    raw: dict[str, np.ndarray],
    ema: dict[str, np.ndarray] | None,
    arch: bytes | None = None,
    prefix: str = "module.",
) -> bytes:
    """A whole training checkpoint in the zip format, with a configuration object in ``args``.

    Equal arrays (the same object) share a storage.
    """
    storages, keys = {}, {}

    def add(array):
        array = np.asarray(array)
        if id(array) not in keys:
            keys[id(array)] = key = str(len(storages))
            # Keeps the array alive, so that its id stays its own.
            storages[key] = array
        kind = _STORAGE_OF_DTYPE[array.dtype.name]
        return tensor(keys[id(array)], array.shape, kind=kind)

    entries = {
        "epoch": number(349),
        "state_dict": dict_of({prefix + name: add(array) for name, array in raw.items()}),
        "optimizer": dict_of({"state": dict_of({})}),
        "version": number(2),
        "args": name("yacs.config", "CfgNode") + EMPTY_TUPLE + NEWOBJ,
        "metric": b"G" + struct.pack(">d", 81.3),
    }
    if arch:
        entries["arch"] = arch
    if ema is not None:
        entries["state_dict_ema"] = dict_of({name: add(array) for name, array in ema.items()})
    data = {key: np.ascontiguousarray(array).tobytes() for key, array in storages.items()}
    return zip_file(dict_of(entries), data)
