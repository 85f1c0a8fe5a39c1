"""Files that would cost a careless reader its memory or its time; prints what they cost ours."""

import gc
import json
import pathlib
import resource
import tempfile
import time

from cotnet_jax.weights import torch_files
from helpers import torch_file_builder as build

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


def main() -> dict:
    """Reads each; gives the processor time of each, and the memory that the worst took."""
    seconds, refused = {}, []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: pathlib.Path(folder) / f"{i}.pth" for i, name in enumerate(BOMBS)}
        for name, path in paths.items():
            path.write_bytes(build.zip_file(BOMBS[name]))
        BOMBS.clear()
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, path in paths.items():
            start = time.process_time()
            try:
                torch_files.read_torch_checkpoint(path)
            except torch_files.TorchFileError:
                refused.append(name)
            gc.collect()
            seconds[name] = round(time.process_time() - start, 2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "refused": refused, "grown_mib": round(grown, 1)}


if __name__ == "__main__":
    print(json.dumps(main()))
