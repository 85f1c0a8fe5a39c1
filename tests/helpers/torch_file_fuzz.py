"""Makes files in the three formats by their grammar, with odd parts, and reads them.

python tests/helpers/torch_file_fuzz.py [COUNT] [SEED] [FIRST]

Every input has its own generator: COUNT=1, the same SEED and FIRST=its number make it again.
"""

import collections
import io
import json
import math
import pathlib
import pickle
import pickletools
import random
import struct
import sys
import tempfile
import time
import zipfile

import numpy as np
import safetensors.numpy as safetensors_library

from cotnet_jax.weights import torch_files
from helpers import torch_file_builder as build

STORAGES = {
    **{"FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "BoolStorage": 1, "ComplexFloatStorage": 8, "UntypedStorage": 1},
    **{"QInt8Storage": 1, "ByteStorage": 1},
}
GLOBALS = (
    *(("collections", "OrderedDict"), ("builtins", "set"), ("torch", "Size")),
    *(("_codecs", "encode"), ("torch._utils", "_rebuild_tensor"), ("torch", "float8_e4m3fn")),
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")),
    *(("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2")),
    *(("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor")),
    *(("torch", "FloatStorage"), ("torch", "float32")),
)
UNKNOWN = (("os", "system"), ("builtins", "eval"), ("argparse", "Namespace"))
NAMES = (
    *("conv1.weight", "module.conv1.weight", "_orig_mod.module.fc.weight", "n_averaged"),
    *("layer1.0.conv1.weight", "model.layer1.0.bn1.weight", "fc.weight", "bn1.total_ops"),
    *("bn1.num_batches_tracked", "bn1.weight", "layer1.0.conv2.weight"),
)
ODD_NAMES = ("x" * 300, "\x1b[2J", "", "module.", "." * 50, "module.fc.weight")
TOP = (
    *("state_dict", "model", "model_state_dict", "ema", "state_dict_ema", "ema_state_dict"),
    *("arch", "epoch", "metric", "optimizer", "args"),
)
SIZES = (0, 1, 1, 2, 3, 5, 8, 17, 33, 100, 2**31, 2**47, 2**62, 2**64, -1)
DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", ""),
    *("F8_E8M0", "f32"),
)
BYTES_OF_DTYPE = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}


def some_names(rng: random.Random) -> list[str]:
    """Return names of tensors, in a tenth of all cases with an odd one."""
    names = rng.sample(NAMES, rng.randint(0, 5))
    return names + ([rng.choice(ODD_NAMES)] if rng.random() < 0.1 else [])


class Pickle:
    """Makes the opcodes of one random pickle; ``storages`` are (type, elements) of those named."""

    def __init__(self, rng: random.Random, view: bool):
        self.rng = rng
        self.view = view
        self.storages: dict[str, tuple[str, int]] = {}
        self.memo = 0

    def storage_bytes(self) -> dict[str, bytes]:
        return {key: bytes(STORAGES[kind] * n) for key, (kind, n) in self.storages.items()}

    def top(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.1:
            return self.value(3)
        parts = {}
        for name in rng.sample(TOP, rng.randint(1, 4)):
            is_dict = "state" in name or name in ("model", "ema")
            parts[name] = self.state_dict() if is_dict else self.value(2)
        return build.dict_of(parts) if rng.random() < 0.8 else self.state_dict()

    def state_dict(self) -> bytes:
        rng = self.rng
        items = b"".join(
            build.text(name) + (self.tensor() if rng.random() < 0.8 else self.value(1))
            for name in some_names(rng)
        )
        entries = build.MARK + items + b"u"
        if rng.random() < 0.3:
            return build.name("collections", "OrderedDict") + b")R" + entries
        return build.EMPTY_DICT + entries

    def value(self, depth: int) -> bytes:
        makers = [self.scalar, self.scalar, self.text, self.get, self.known, self.tensor]
        if depth > 0:
            makers += [self.container, self.container, self.call, self.call, self.repeated]
            made = self.rng.choice(makers)
            data = made(depth - 1) if made in makers[6:] else made()
        else:
            data = self.rng.choice(makers)()
        if self.rng.random() < 0.2 and self.memo < 250:
            data += b"q" + bytes([self.memo])
            self.memo += 1
        return data

    def scalar(self) -> bytes:
        rng = self.rng
        return rng.choice(
            (
                lambda: rng.choice((b"N", b"\x88", b"\x89", b")", b"}", b"]", b"\x8f", b"I01\n")),
                lambda: build.number(rng.choice(SIZES)),
                lambda: build.number(rng.getrandbits(rng.choice((8, 64, 900, 1500)))),
                lambda: b"J" + struct.pack("<i", rng.randint(-9, 9)),
                lambda: b"G" + struct.pack(">d", rng.choice((0.5, math.nan, math.inf, 1e300))),
                lambda: b"C" + bytes([n := rng.randint(0, 99)]) + rng.randbytes(n),
            )
        )()

    def text(self) -> bytes:
        rng = self.rng
        return build.text(rng.choice(("a", "\u2028", "\x00", "ab c")) * rng.choice((0, 1, 9, 3000)))

    def get(self) -> bytes:
        if self.memo and self.rng.random() < 0.95:
            return b"h" + bytes([self.rng.randrange(self.memo)])
        return self.scalar()

    def known(self) -> bytes:
        rng = self.rng
        module, attribute = rng.choice(GLOBALS if rng.random() < 0.2 else UNKNOWN)
        if rng.random() < 0.3:
            return build.name(module, attribute)
        return build.text(module) + build.text(attribute) + build.STACK_GLOBAL

    def container(self, depth: int) -> bytes:
        rng = self.rng
        values = b"".join(self.value(depth) for _ in range(2 * rng.randint(0, 3)))
        values = b"(" + values
        return (
            rng.choice((values + b"l", values + b"t", values + b"d", b"}" + values + b"u"))
            if rng.random() < 0.7
            else rng.choice((b"]" + values + b"e", values + b"\x91", b"\x8f" + values + b"\x90"))
        )

    def call(self, depth: int) -> bytes:
        rng = self.rng
        function, arguments = self.known(), self.container(depth)
        return rng.choice(
            (
                lambda: function + b"(" + self.value(depth) * rng.randint(0, 4) + b"tR",
                lambda: function + arguments + b"R",
                lambda: function + arguments + b"\x81",
                lambda: function + arguments + self.value(depth) + b"\x92",
                lambda: b"(" + function + self.value(depth) + b"o",
                lambda: function + b")R" + self.value(depth) + b"b",
                lambda: self.value(depth) + b"Q",
            )
        )()

    def repeated(self, depth: int) -> bytes:
        """Few opcodes many times, which cost more than they take."""
        rng = self.rng
        count = rng.choice((10, 100, 1000, 3000))
        long = build.text("x" * rng.choice((10, 1000, 100_000)))
        keep, give = b"q\xff", b"h\xff"
        some = self.value(depth)
        return rng.choice(
            (
                lambda: long + keep + b"0(" + (give + give + b"\x93") * count + b"l",
                lambda: long + keep + b"0]" + (give + b"\x85") * count + b"l",
                lambda: self.known() + (b")R") * count,
                lambda: self.known() + b")R" * count + keep + b"0}(" + (give + b"N") * count + b"u",
                lambda: long + keep + b"0}(" + b"(" + give * count + b"tNu",
                lambda: long + keep + b"0}(" + (b"(" + give * 50 + b"tN") * (count // 50) + b"u",
                lambda: (
                    b"}("
                    + b"".join(build.number(i * (2**61 - 1)) + b"N" for i in range(1, count))
                    + b"u"
                ),
                lambda: b"]" + keep + (b"(" + give * 9 + b"l" + keep) * min(count, 100),
                lambda: (
                    self.tensor()
                    + keep
                    + b"0}("
                    + b"".join(build.text(str(i)) + give for i in range(count))
                    + b"u"
                ),
                lambda: (
                    b"]("
                    + build.text("a") * count
                    + b"e"
                    + keep
                    + b"0("
                    + (build.name("builtins", "set") + give + b"\x85R") * count
                    + b"l"
                ),
                lambda: (
                    long
                    + keep
                    + b"0("
                    + (build.name("_codecs", "encode") + give + build.text("latin1") + b"\x86R")
                    * count
                    + b"l"
                ),
                lambda: b"(" + some * (200_000 // len(some)) + b"t",
                lambda: b"(" * count + some + b"l" * count,
                lambda: b"]" + keep + (b"0" + give + some + b"a") * (100_000 // len(some)),
            )
        )()

    def tensor(self) -> bytes:
        rng = self.rng
        shape = [rng.choice((0, 1, 1, 2, 3, 5, 17)) for _ in range(rng.choice((0, 1, 1, 2, 2, 4)))]
        elements = math.prod(shape)
        # A storage of its own, or one that other tensors have too.
        shared = self.storages and rng.random() < 0.2
        key = rng.choice(list(self.storages)) if shared else str(len(self.storages))
        kind = rng.choice(tuple(STORAGES))
        kind, elements = self.storages.setdefault(key, (kind, elements))
        if shared:
            shape = [elements]
        strides, offset = None, 0
        odd = rng.random()
        if odd < 0.02:
            shape = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 4, 33)))]
            strides = [rng.choice((0, 0, 1, 2**40)) for _ in shape]
        elif odd < 0.04:
            offset = rng.choice((1, 7, 2**40))
        elif odd < 0.06:
            kind = rng.choice(tuple(STORAGES))
        elif odd < 0.12 and elements:
            shape = [rng.choice((2**10, 2**18, 2**20)), *shape[:1]]
            strides = [0] * len(shape)
        return build.tensor(key, shape, strides, offset, elements, kind, self.view)


def shuffle_opcodes(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, exchange and move whole opcodes."""
    try:
        starts = [at for _, _, at in pickletools.genops(data + b".")]
    except Exception:
        return data
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.randint(1, 4)):
        if not parts:
            break
        at, to = rng.randrange(len(parts)), rng.randrange(len(parts))
        what = rng.randrange(4)
        if what == 0:
            del parts[at]
        elif what == 1:
            parts[to:to] = parts[at : at + rng.randint(1, 5)] * rng.choice((1, 2, 500))
        elif what == 2:
            parts[at], parts[to] = parts[to], parts[at]
        else:
            parts.insert(to, bytes([rng.randrange(256)]))
    return b"".join(parts)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        at = rng.randrange(len(data))
        what = rng.randrange(5)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), rng.randbytes(4)))
        elif what == 2:
            del data[at : at + rng.randint(1, 100)]
        elif what == 3:
            data[at:at] = data[at : at + rng.randint(1, 100)] * rng.randint(1, 20)
        else:
            del data[at:]
    return bytes(data)


def legacy(rng: random.Random) -> bytes:
    made = Pickle(rng, view=True)
    value = made.top()
    if rng.random() < 0.2:
        value = shuffle_opcodes(value, rng)
    storages = made.storage_bytes()
    data = build.legacy_file(value).removesuffix(pickle.dumps([], 2))
    data += pickle.dumps(sorted(storages), 2)
    for key in sorted(storages):
        count = made.storages[key][1] + (rng.random() < 0.02)
        data += struct.pack("<q", count) + storages[key]
    return data


def zipped(rng: random.Random) -> bytes:
    made = Pickle(rng, view=False)
    value = made.top()
    if rng.random() < 0.2:
        value = shuffle_opcodes(value, rng)
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + value + build.STOP)
        if rng.random() < 0.3:
            archive.writestr("a/byteorder", rng.choice((b"big", b"little", b"")))
        for key, content in made.storage_bytes().items():
            wrong = b"x" if rng.random() < 0.03 else b""
            archive.writestr(f"a/data/{key}", content + wrong)
    data = bytearray(buffer.getvalue())
    if rng.random() < 0.2:
        _change_directory(data, rng)
    return bytes(data)


def _change_directory(data: bytearray, rng: random.Random):
    """Let entries of the zip directory share a place, or claim other sizes and methods."""
    starts, at = [], data.find(b"PK\x01\x02")
    while at >= 0:
        starts.append(at)
        at = data.find(b"PK\x01\x02", at + 1)
    entry, other = rng.choice(starts), rng.choice(starts)
    field = rng.choice((8, 10, 16, 20, 24, 28, 30, 42, 42, 42))
    new = rng.choice((data[other + field : other + field + 4], rng.randbytes(4), b"\xff" * 4))
    width = 2 if field in (8, 10, 28, 30) else 4
    data[entry + field : entry + field + width] = new[:width]


def safetensors(rng: random.Random) -> bytes:
    header, at = {}, 0
    for name in some_names(rng):
        dtype = rng.choice(DTYPES)
        shape = [rng.choice((0, 1, 2, 3, 5, 17)) for _ in range(rng.choice((0, 1, 2, 4)))]
        size = BYTES_OF_DTYPE.get(dtype, 1)
        for length in shape:
            size *= length
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        if rng.random() < 0.1:
            field = rng.choice(tuple(entry))
            odd = (
                *(
                    None,
                    1.5,
                    "x",
                    {},
                    [],
                    [[]],
                    -1,
                    True,
                    2**70,
                    [0, 2**62],
                    [1] * 100,
                    [2**62] * 8,
                ),
                *([at, 2**63], [at + size, at], [0, size], [at], ["0", "1"], [1.0], [False, True]),
            )
            entry[field] = rng.choice(odd)
        header[name] = entry
        at += size
    if rng.random() < 0.4:
        header["__metadata__"] = rng.choice(
            ({"format": "pt"}, {"weights": "ema", "model": "\x1b"}, {"a": 1}, [], None, "x")
        )
    text = json.dumps(header)
    odd = rng.random()
    if odd < 0.05:
        count = rng.choice((10, 3000, 100_000))
        text = rng.choice(
            (
                '{"a":' + "[" * count,
                '{"a":' * count,
                '{"a":' + "9" * count + "}",
                '{"a":[' + "[]," * count + "[]]}",
                "{" * count,
                "{" + '"a":1,' * count + '"a":1}',
            )
        )
    elif odd < 0.1:
        text = text.replace("dtype", "shape")
    data = text.encode() + b" " * rng.randint(0, 9)
    size = len(data) if rng.random() < 0.97 else rng.choice((0, 1, 2**40, 2**63 + 5, len(data) + 9))
    return struct.pack("<Q", size) + data + bytes(at + rng.choice((0,) * 18 + (1, 9)))


def sharded(rng: random.Random, folder: pathlib.Path) -> pathlib.Path:
    files = ("a-1.safetensors", "a-2.safetensors")
    for file, names in zip(files, (NAMES[5:], NAMES[:5]), strict=True):
        tensors = {name: np.zeros(rng.randint(0, 5), np.float16) for name in names}
        good = safetensors_library.save(tensors)
        (folder / file).write_bytes(good if rng.random() < 0.7 else safetensors(rng))
    odd = ("../a-1.safetensors", "/etc/passwd", "", "a.bin", 3, None, [], "none.safetensors", ".")
    places = {name: files[name in NAMES[:5]] for name in NAMES if rng.random() < 0.3}
    if rng.random() < 0.2:
        places["fc.bias"] = rng.choice(odd)
    index = {"metadata": {"total_size": rng.choice(SIZES)}, "weight_map": places}
    if rng.random() < 0.1:
        index["weight_map"] = rng.choice((None, [], 3, {"a": {}}))
    text = json.dumps(index).encode()
    path = folder / "a.safetensors.index.json"
    path.write_bytes(damage_bytes(text, rng) if rng.random() < 0.2 else text)
    return path


MAKERS = {"zip": zipped, "legacy": legacy, "safetensors": safetensors}


def make(number: int, seed: int, folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    """Write input ``number``; return its format and its path."""
    rng = random.Random(seed * 2**32 + number)
    form = rng.choices(("zip", "legacy", "safetensors", "shards"), (4, 4, 3, 1))[0]
    if form == "shards":
        return form, sharded(rng, folder)
    data = MAKERS[form](rng)
    if rng.random() < 0.2:
        data = damage_bytes(data, rng)
    path = folder / "input.pth"
    path.write_bytes(data)
    return form, path


def read(path: pathlib.Path) -> None:
    """Read all there is: the contents, the state dicts, and their arrays."""
    for kind in torch_files.read_torch_checkpoint(path).available:
        checkpoint = torch_files.read_torch_checkpoint(path, kind)
        arrays = checkpoint.arrays()
        assert arrays.keys() == checkpoint.state_dict.keys()


# Processor time that a reading may take. On an idle core each takes less than one second; a core
# that is shared stretches that. A reader without a budget would take ten times more.
MOST_SECONDS = 4


def memory(reset_peak: bool = False) -> int:
    """Return the process's peak memory since it was last reset, in KiB (Linux)."""
    if reset_peak:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main(count: int, seed: int, first: int = 0) -> dict:
    """Read ``count`` inputs; the result counts outcomes, and lists what must not be."""
    outcomes, bad, slowest = collections.Counter(), [], (0.0, 0)
    messages: set[str] = set()
    most = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for number in range(first, first + count):
            form, path = make(number, seed, folder)
            before = memory(reset_peak=True)
            start = time.process_time()
            try:
                read(path)
                outcomes[f"{form}, read"] += 1
            except torch_files.TorchFileError as error:
                outcomes[f"{form}, refused"] += 1
                message = str(error)
                if len(message) > 6000 or not message.startswith(str(folder)):
                    bad.append(f"{number}: unclear error {message[:300]}")
                if ": damaged (" in message:
                    bad.append(f"{number}: {message[:300]}, {error.__cause__!r}")
                messages.add(message.partition(": ")[2][:30])
            except BaseException as error:
                bad.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
            elapsed = time.process_time() - start
            slowest = max(slowest, (elapsed, number))
            most = max(most, memory() - before)
            if elapsed > MOST_SECONDS:
                bad.append(f"{number}: took {elapsed:.1f} s")
    return {
        "count": count,
        "outcomes": dict(sorted(outcomes.items())),
        "kinds_of_errors": len(messages),
        "bad": bad[:50],
        "slowest_s": round(slowest[0], 3),
        "slowest": slowest[1],
        "most_mib": round(most / 1024, 1),
    }


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(main(*numbers, *(1000, 0, 0)[len(numbers) :]), indent=1))
