"""Files that would cost a careless reader its memory or its time; prints what they cost ours."""

import gc
import json
import pathlib
import sys
import tempfile
import time

from cotnet_jax.weights import torch_files
from helpers import torch_file_builder as build
from helpers.torch_file_fuzz import memory

# Each is a few bytes to a few MB that would cost a naive reader its memory or its time.
BOMBS = {
    "a huge integer": b"\x8b" + (5 * 10**6).to_bytes(4, "little") + b"\x7f" * 5 * 10**6,
    "a huge decimal": b"L" + b"9" * 10**6 + b"L\n",
    "a string of 2 GB": b"X" + (2**31 - 1).to_bytes(4, "little") + b"abc",
    "bytes of 2**60": b"\x8e" + (2**60).to_bytes(8, "little") + b"abc",
    "a frame of 2**60": b"\x95" + (2**60).to_bytes(8, "little") + b"N",
    "a giant memo index": b"Nr\xff\xff\xff\xff" + b"0" + b"p" + b"9" * 4000 + b"\n",
    "two million lists": b"]" * 2_000_000,
    "deep marks": b"(" * 2_000_000,
    "nested tuples": b")" + build.TUPLE1 * 900_000,
    "nested lists": b"]q\x00" + b"]h\x00a" * 200_000,
    "nested calls": build.name("a", "b") + (b")" + build.REDUCE) * 400_000,
    "a list of itself": b"]q\x00h\x00a",
    "a dictionary of itself": b"}q\x00" + build.text("a") + b"h\x00s",
    "billion laughs": b"]q\x00" + (b"(" + b"h\x00" * 9 + b"lq\x00") * 30,
    "a key of shared tuples": b"}" + b")" + (b"q\x00h\x00" + build.TUPLE2) * 60 + b"Ns",
    "a list as a key": b"}]Ns",
    "colliding keys": b"}("
    + b"".join(build.number(i * (2**61 - 1)) + b"N" for i in range(1, 100_000))
    + b"u",
    "repeated copies of a list": b"]q\x00("
    + b"X\x01\x00\x00\x00a" * 100_000
    + b"e0"
    + (build.name("builtins", "set") + b"h\x00" + build.TUPLE1 + build.REDUCE) * 5000,
    "repeated copies of a text": build.text("a" * 10**6)
    + b"q\x000"
    + (build.name("_codecs", "encode") + b"h\x00" + build.text("latin1") + b"\x86R") * 5000,
}


def keep(number: int, value: bytes) -> bytes:
    """Opcodes that put a value away; ``give`` brings it back."""
    return value + bytes([ord("q"), number]) + b"0"


def give(number: int) -> bytes:
    return bytes([ord("h"), number])


TENSOR = keep(0, build.name("torch._utils", "_rebuild_tensor_v2")) + keep(
    1,
    build.tuple_of(
        build.storage("0", 1),
        build.number(0),
        build.tuple_of(*[build.number(1)] * 32),
        build.tuple_of(*[build.number(2**40)] * 32),
        b"\x89",
        b"N",
    ),
)
LONG_NAME = keep(0, build.text("\u2028" * 999)) + keep(1, build.text("\u2029" * 999))
NO_CALL = keep(0, build.name("_codecs", "encode")) + keep(1, build.text("a") * 2 + build.TUPLE2)
# (opcodes before, opcodes that are repeated up to a size): what costs most for its size.
REPEATED = {
    "dictionaries of nothing": (b"", b"(d"),
    "entries of nothing": (b"}", b"(u"),
    "tensors of 32 dimensions": (TENSOR, give(0) + give(1) + build.REDUCE),
    "long names of classes": (LONG_NAME, give(0) + give(1) + build.STACK_GLOBAL),
    "old instances": (b"", b"(ia\nb\n"),
    "storages": (keep(0, build.storage("0", 1)[:-1]), give(0) + build.PERSID),
    "calls that are not made": (NO_CALL, give(0) + give(1) + build.REDUCE),
    "large integers as keys": (keep(0, build.number(2**1000)) + b"}", give(0) + b"Ns"),
    "a log of dictionaries": (
        keep(0, build.text("loss")) + keep(1, build.text("step")) + b"]",
        b"}(" + give(0) + b"G" + bytes(8) + give(1) + b"J" + bytes(4) + b"u",
    ),
    "sets": (b"", b"\x8f"),
    "a memo": (b"N", b"\x94"),
}
SIZE = 2 * 10**6


def main(size: int = SIZE) -> dict:
    """Reads each; gives the processor time of each, and the memory that the worst took.

    Args:
      size: bytes of those of ``REPEATED``; another one than the default reads only them.
    """
    if size != SIZE:
        BOMBS.clear()
    for name, (before, repeated) in REPEATED.items():
        BOMBS[name] = before + repeated * ((size - len(before)) // len(repeated))
    seconds, refused, grown = {}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: pathlib.Path(folder) / f"{i}.pth" for i, name in enumerate(BOMBS)}
        for name, path in paths.items():
            path.write_bytes(build.zip_file(BOMBS[name], {"0": bytes(4)}))
        BOMBS.clear()
        gc.collect()
        for name, path in paths.items():
            before = memory(reset_peak=True)
            start = time.process_time()
            try:
                torch_files.read_torch_checkpoint(path)
            except torch_files.TorchFileError:
                refused.append(name)
            gc.collect()
            seconds[name] = round(time.process_time() - start, 2)
            grown = max(grown, memory() - before)
    return {"seconds": seconds, "refused": refused, "grown_mib": round(grown / 1024, 1)}


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
