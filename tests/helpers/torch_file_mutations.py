"""Damages small PyTorch files at random and reads them; prints what came of it.

python tests/torch_file_mutations.py [COUNT] [SEED]
"""

import collections
import json
import pathlib
import resource
import sys
import tempfile
import time
import zipfile

import numpy as np

from cotnet_jax.weights import torch_files
from helpers.torch_file_fuzz import MOST_SECONDS

FOLDER = pathlib.Path(__file__).parents[1] / "goldens" / "torch_files"
NAMES = ("training_checkpoint.pth.tar", "training_checkpoint_legacy.pth.tar", "bare_state_dict.pth")


def _flip_bits(data, rng):
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] ^= 1 << rng.integers(8)
    return data


def _overwrite(data, rng):
    at = rng.integers(len(data))
    size = int(rng.integers(1, 17))
    fill = rng.choice([0, 255, -1])
    data[at : at + size] = rng.bytes(size) if fill < 0 else bytes([fill]) * size
    return data


def _truncate(data, rng):
    return data[: rng.integers(len(data))]


def _remove(data, rng):
    at, size = rng.integers(len(data)), int(rng.integers(1, 200))
    del data[at : at + size]
    return data


def _repeat(data, rng):
    at, size, to = rng.integers(len(data)), int(rng.integers(1, 200)), rng.integers(len(data))
    data[to:to] = data[at : at + size] * int(rng.integers(1, 20))
    return data


def _swap_pieces(data, rng):
    size = int(rng.integers(1, 200))
    first, second = sorted(rng.integers(len(data) - size, size=2))
    if second >= first + size:
        data[first : first + size], data[second : second + size] = (
            data[second : second + size],
            data[first : first + size],
        )
    return data


def _swap_members(data, rng):
    """Writes the zip file anew with two members' contents exchanged; checksums fit."""
    if data[:2] != b"PK":
        return _swap_pieces(data, rng)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        names = list(members)
        first, second = rng.choice(len(names), size=2, replace=False)
        first, second = names[first], names[second]
        members[first], members[second] = members[second], members[first]
        file.seek(0)
        file.truncate()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        file.seek(0)
        return bytearray(file.read())


def _swap_names(data, rng):
    """Exchanges two members' names in the directory at the end, of equal length if possible."""
    if data[:2] != b"PK":
        return _overwrite(data, rng)
    start = data.find(b"PK\x01\x02")
    tail = bytes(data[start:])
    first, second = rng.integers(10, size=2)
    one, other = b"/data/%d" % first, b"/data/%d" % second
    tail = tail.replace(one, b"/data/#").replace(other, one).replace(b"/data/#", other)
    return data[:start] + tail


MUTATIONS = (
    _flip_bits,
    _overwrite,
    _truncate,
    _remove,
    _repeat,
    _swap_pieces,
    _swap_members,
    _swap_names,
)


def _expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        raw = {name: arrays[name] for name in arrays.files}
    ema = {k: v * 2 if v.dtype.kind == "f" else v for k, v in raw.items()}
    return {"raw": raw, "ema": ema}


def _right(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(np.asarray(found[name], expected[name].dtype), expected[name])
        for name in expected
    )


def main(count: int, seed: int) -> dict:
    """Reads ``count`` damaged files; the result counts outcomes, and lists what must not be."""
    rng = np.random.default_rng(seed)
    originals = {name: (FOLDER / name).read_bytes() for name in NAMES}
    expected = _expected()
    outcomes, bad, slowest = collections.Counter(), [], 0.0
    for name in NAMES:
        torch_files.read_torch_checkpoint(FOLDER / name).arrays()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "mutation.pth.tar"
        for index in range(count):
            name = NAMES[index % len(NAMES)]
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            path.write_bytes(mutation(bytearray(originals[name]), rng))
            case = f"{index} {name} {mutation.__name__}"
            weights = (None, "raw")[int(rng.integers(2))]
            start = time.process_time()
            try:
                read = torch_files.read_torch_checkpoint(path, weights)
                arrays = read.arrays()
            except torch_files.TorchFileError as error:
                outcomes["refused"] += 1
                if not str(error).startswith(f"{path}: ") or len(str(error)) > 3000:
                    bad.append(f"{case}: unclear error {error}")
            except BaseException as error:
                bad.append(f"{case}: {type(error).__name__}: {error}")
            else:
                # The legacy format has no checksums: values and names can be others.
                right = _right(arrays, expected[read.kind])
                outcomes["read, right" if right else "read, other values"] += 1
                if not right and read.format == "zip":
                    bad.append(f"{case}: wrong tensors")
            elapsed = time.process_time() - start
            slowest = max(slowest, elapsed)
            if elapsed > MOST_SECONDS:
                bad.append(f"{case}: took {elapsed:.1f} s")
        created = [entry.name for entry in pathlib.Path(folder).iterdir() if entry != path]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "count": count,
        "outcomes": dict(outcomes),
        "bad": bad,
        "created": created,
        "slowest_s": round(slowest, 3),
        "grown_mib": round(grown, 1),
    }


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(main(*numbers, *(300, 0)[len(numbers) :])))
