"""Compiled kernels on disk, without a GPU: Triton is real, jax-triton is stood in for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Not imported here: other tests need it as an interpreter.
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed"),
]
TESTS = Path(__file__).parents[1]
VERSIONS = ("0.3.1", "0.4.1")

KERNELS = """
import triton
import triton.language as tl

OFFSET = tl.constexpr(1)

@triton.jit
def change(x):
    return x * 2

@triton.jit
def kernel(x_ptr, y_ptr, SIZES: tl.constexpr):
    lane = tl.arange(0, SIZES.block)
    tl.store(y_ptr + lane, change(tl.load(x_ptr + lane)) + OFFSET)
"""
# Defines what the scripts below use. Its arguments are the cache's folder and that of the kernels.
SCRIPT = """
import dataclasses, importlib, json, sys
from typing import NamedTuple
import jax
from helpers.jax_triton_stand_in import JaxTriton

cache, folder, version = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache or None)
library = JaxTriton(version)
from cotnet_jax.ops import kernel_cache
kernel_cache.keep_compiled_kernels()
sys.path.insert(0, folder)
import kernels

class Sizes(NamedTuple):
    block: int
    other: int = 0
    def __str__(self):
        return "sizes"

SIGNATURE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "SIZES": "constexpr"}

def build(sizes=Sizes(64), signature=SIGNATURE, **options):
    text, result = library.compile(kernels.kernel, signature, {"SIZES": sizes}, **options)
    return [text, result.binary, result.name, result.shared_mem_bytes]

"""
START = "print(json.dumps([build(), library.compiled]))"


INSTALLED = """
import json, sys
cache, folder, _ = sys.argv[1:]
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", cache)
try:
    from jax._src.lib import gpu_triton
    import jax_triton
    from jax_triton import triton_lib
    gpu_triton.get_compute_capability
except (ImportError, AttributeError) as error:
    print(json.dumps([str(error), None]))
    sys.exit()
gpu_triton.get_compute_capability = lambda device: 90
compiled, compile = [], triton_lib.compile_ttir_inplace

def count(*arguments):
    result = compile(*arguments)
    compiled.append(result.name)
    return result

triton_lib.compile_ttir_inplace = count
sys.path.insert(0, folder)
import kernels
from typing import NamedTuple
from cotnet_jax.ops.triton_call import call_kernel

class Sizes(NamedTuple):
    block: int

def call(x):
    return call_kernel(kernels.kernel, 1, 4, (x,), [x], name="change", SIZES=Sizes(64))

lowered = jax.jit(call).trace(jnp.ones(64)).lower(lowering_platforms=("cuda",))
print(json.dumps([lowered.as_text(), compiled]))
"""


@pytest.fixture
def start(tmp_path):
    """A function that runs a script after ``before``, and returns its process."""
    kernels = tmp_path / "source" / "kernels.py"
    kernels.parent.mkdir()
    kernels.write_text(KERNELS)

    def start(script=START, version=VERSIONS[0], cache=tmp_path / "cache", before=SCRIPT):
        # Not TRITON_INTERPRET: this process's Triton may interpret.
        paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        return subprocess.Popen(
            [sys.executable, "-Bc", before + script, str(cache), str(kernels.parent), version],
            env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """A function that runs a script to its end, and returns what it prints, and its errors."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        return json.loads(output), errors

    return run


def kept(folder):
    return sorted((folder / "cache" / "triton_kernels").iterdir())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_second_start_compiles_nothing(version, run, tmp_path):
    (first, compiled), _ = run(version=version)
    assert compiled == ["kernel"]
    assert ".target sm_90" in first[1]
    assert len(kept(tmp_path)) == 1
    (second, compiled), _ = run(version=version)
    assert (second, compiled) == (first, [])
    (uncached, compiled), _ = run(version=version, cache="")
    assert (uncached, compiled) == (first, ["kernel"])


def test_the_installed_jax_triton_compiles_nothing_at_its_second_start(run):
    (first, compiled), _ = run("", before=INSTALLED)
    if compiled is None:
        pytest.skip(f"jax-triton cannot be imported: {first}")
    assert compiled == ["kernel"]
    assert run("", before=INSTALLED)[0] == [first, []]


def test_damaged_files_are_compiled_again(run, tmp_path):
    (first, _), _ = run()
    (file,) = kept(tmp_path)
    content = file.read_bytes()
    flipped = bytes([*content[:-1], content[-1] ^ 1])
    for damaged in (flipped, content[:-9], content[:20], b""):
        file.write_bytes(damaged)
        (again, compiled), errors = run()
        assert (again, compiled) == (first, ["kernel"])
        assert "is damaged" in errors
        assert file.read_bytes() == content


def test_parallel_starts_share_a_folder(start, tmp_path):
    processes = [start(version=version) for version in VERSIONS * 2]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    results = [json.loads(output)[0] for output, _ in outputs]
    assert all(result == results[0] for result in results)
    assert [file.name.partition("-")[0] for file in kept(tmp_path)] == ["kernel"] * 2


VARIATIONS = """
names = lambda: {file.name for file in kernel_cache._folder().iterdir()}
counts = [(build(), len(names()))[1]]
half = SIGNATURE | {"x_ptr": "*fp16", "y_ptr": "*fp16"}
aligned = {(0,): [["tt.divisibility", 16]]}

@dataclasses.dataclass(frozen=True)
class Config:
    block: int

for variation in (
    dict(sizes=Sizes(128)),
    dict(sizes=Sizes(64, 1)),  # whose str is the same
    dict(sizes=Config(64)),
    dict(signature=half),
    dict(attrs=aligned),
    dict(num_warps=8),
    dict(num_stages=5),
    dict(capability=80),
    dict(enable_fp_fusion=False),
    dict(),
):
    build(**variation)
    counts.append(len(names()))
for old, new in (("x * 2", "x * 3"), ("constexpr(1)", "constexpr(2)"), (") + OFF", ") - OFF")):
    file = kernels.__file__
    text = open(file).read()
    assert old in text
    open(file, "w").write(text.replace(old, new))
    import linecache
    linecache.clearcache()
    importlib.reload(kernels)
    build()
    counts.append(len(names()))
from unittest import mock
with mock.patch.object(kernel_cache.triton, "__version__", "3"):
    kernel_cache._versions.cache_clear()
    build()
counts.append(len(names()))
print(json.dumps([counts, len(library.compiled)]))
"""


def test_all_that_decides_is_in_the_name(run):
    (counts, compiled), _ = run(VARIATIONS)
    assert counts == [*range(1, 11), 10, *range(11, 15)]
    assert compiled == 14


UNKEPT = """
build(debug=True)
library.triton_lib._JAX_TRITON_DUMP_DIR = "dumps"
build()
library.triton_lib._JAX_TRITON_DUMP_DIR = None

class Opaque:
    block = 64

build(Opaque())
jax.config.update("jax_enable_compilation_cache", False)
build()
print(json.dumps(library.compiled))
"""


def test_some_kernels_are_not_kept(run, tmp_path):
    assert run(UNKEPT)[0] == ["kernel"] * 4
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_only_time(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    (_, compiled), errors = run()
    assert compiled == ["kernel"]
    assert "cannot be kept" in errors


def test_another_jax_triton_is_left_alone(run, tmp_path):
    (_, compiled), _ = run(version="0.3.2")
    assert compiled == ["kernel"]
    assert not (tmp_path / "cache").exists()
