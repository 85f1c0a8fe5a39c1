"""Compiled Triton kernels on disk, so that only the first start of a program compiles them.

jax-triton compiles every kernel to PTX anew in each process. Here its compilation is wrapped: what
it returns is kept in ``triton_kernels/`` of JAX's compilation cache, where JAX has one and it is on
a mounted file system (``jax_compilation_cache_dir``, ``jax_enable_compilation_cache``). A file is a
kernel, under a name that is the checksum of all that decides how it is compiled, and is written
whole: any number of processes and hosts may share the folder, and it may be emptied at any time.

jax-triton has no public way to do this. With a version of it that was not tried, kernels are
compiled at every start, as they are without a cache.
"""

import dataclasses
import functools
import hashlib
import json
import types
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax_triton
import jaxlib
import triton
from absl import logging
from triton.compiler import compiler

from cotnet_jax import files

FOLDER = "triton_kernels"
SETTINGS = ("compilation_cache_dir", "enable_compilation_cache")
JAX_TRITON_VERSIONS = ("0.3.1", "0.4.1")


class _NewKernel(NamedTuple):
    """A kernel to be compiled and then kept in ``file``; in the place of Triton's own module."""

    module: Any
    file: Path

    def __str__(self) -> str:
        return str(self.module)


class _KeptKernel(NamedTuple):
    """A kernel from the disk; in the place of Triton's own module.

    Attributes:
      ttir: the kernel in Triton's intermediate representation.
      result: the fields of jax-triton's ``CompilationResult``.
    """

    ttir: str
    result: dict[str, Any]

    def __str__(self) -> str:
        return self.ttir


@functools.cache
def keep_compiled_kernels() -> None:
    """Have jax-triton look on the disk before it compiles a kernel, in this process from now on."""
    if jax_triton.__version__ not in JAX_TRITON_VERSIONS:
        logging.info(
            "jax-triton %s: Triton kernels are compiled at every start. %s keeps them on disk.",
            jax_triton.__version__,
            " or ".join(JAX_TRITON_VERSIONS),
        )
        return
    library: Any = jax_triton.triton_lib
    library.compile_ttir_inplace = _wrap_back_end(library)
    if hasattr(library, "code_gen"):  # 0.3
        front_end = library.code_gen.ast_to_ttir

        def ast_to_ttir(fn, source, *, options, **arguments):
            generate = functools.partial(front_end, fn, source, options=options, **arguments)
            return _find(source, options, generate)

        library.code_gen = _with(library.code_gen, ast_to_ttir=ast_to_ttir)
    else:

        class Source(library.tc.ASTSource):
            def make_ir(self, target, options, *arguments):
                generate = functools.partial(super().make_ir, target, options, *arguments)
                return _find(self, options, generate)

        library.tc = _with(library.tc, ASTSource=Source)


def _with(module: types.ModuleType, **attributes: Any) -> types.SimpleNamespace:
    """Return what stands for a module, with other ``attributes``, for one importer alone."""
    return types.SimpleNamespace(**{**vars(module), **attributes})


def _find(source, options, generate):
    """Return a kernel from the disk; or else ``generate`` it, to be kept there."""
    file = _file_of(source, options)
    if file is None:
        return generate()
    return _read(file) or _NewKernel(generate(), file)


def _wrap_back_end(library):
    """Return a ``compile_ttir_inplace`` that also takes what ``_find`` returns."""
    compile_in_place = library.compile_ttir_inplace

    def compile_ttir_inplace(module, *arguments):
        if isinstance(module, _KeptKernel):
            return library.CompilationResult(**module.result)
        if not isinstance(module, _NewKernel):
            return compile_in_place(module, *arguments)
        # The passes change the module in place.
        ttir = str(module)
        result = compile_in_place(module.module, *arguments)
        # Only dumps read these, and dumps are never taken from the disk.
        kept = dataclasses.replace(result, ttgir=None, llir=None)
        _write(module.file, _KeptKernel(ttir, dataclasses.asdict(kept)))
        return result

    return compile_ttir_inplace


def _file_of(source: compiler.ASTSource, options: Any) -> Path | None:
    """Return the file of a kernel; None where it is not to be kept."""
    folder = _folder()
    if folder is None or options.backend_name != "cuda" or options.debug:
        return None
    # Who dumps, or compiles for another GPU than there is, wants to see the compiler at work.
    if jax_triton.triton_lib._JAX_TRITON_DUMP_DIR or triton.knobs.runtime.override_arch:
        return None
    try:
        # Not the source's own hash, which takes constants by str: two shapes may have the same.
        described = [
            *_versions(options.arch),
            _describe(source.fn),
            _describe(source.signature),
            _describe(source.constants),
            _describe(source.attrs),
            options.hash(),
            _describe(compiler.get_cache_invalidating_env_vars()),
        ]
    except TypeError as error:
        logging.info("%s is compiled at every start: %s", source.name, error)
        return None
    key = hashlib.sha256("\n".join(described).encode()).hexdigest()
    return folder / f"{source.name}-{key}"


def _folder() -> Path | None:
    """Return the folder of the kernels; None where JAX keeps no compiled programs either."""
    cache, enabled = (jax.config.values[f"jax_{name}"] for name in SETTINGS)
    if not cache or not enabled or files.is_url(cache):
        return None
    return files.local(cache) / FOLDER


@functools.cache
def _versions(arch: str) -> tuple[str, ...]:
    """Return what decides, besides a kernel and its options, how it is compiled for a GPU."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    # PTX is as new as the assembler. Properties of constants, which Triton does not hash, are in
    # the sources.
    return (
        *(f"{each.__name__} {each.__version__}" for each in (triton, jax_triton, jaxlib)),
        get_ptxas_version(int(arch.removeprefix("sm"))),
        *(files.sha256(file) for file in sorted(Path(__file__).parent.rglob("*.py"))),
    )


def _describe(value: Any) -> str:
    """Return a text that differs wherever values do, and is the same in every process.

    Raises:
      TypeError: of ``value`` there is none.
    """
    if isinstance(value, triton.JITFunction):
        return value.cache_key
    if isinstance(value, triton.language.constexpr):
        return _describe(value.value)
    if isinstance(value, dict):
        return _describe(sorted(value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__} {_describe(fields)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__qualname__}({', '.join(map(_describe, value))})"
    if value is None or isinstance(value, bool | int | float | str | triton.language.dtype):
        return f"{type(value).__qualname__} {value!r}"
    raise TypeError(f"{value!r} is no number, text or dtype, and no tuple or dataclass of them")


def _read(file: Path) -> _KeptKernel | None:
    """Return the kernel in a file; None where there is none, or it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, packed = content[:32], content[32:]
    if hashlib.sha256(packed).digest() != checksum:
        logging.warning("%s is damaged; the kernel is compiled again.", file)
        return None
    return _KeptKernel(*json.loads(zlib.decompress(packed)))


def _write(file: Path, kernel: _KeptKernel) -> None:
    packed = zlib.compress(json.dumps(kernel).encode())
    try:
        # What lies in it is executed: nobody else may write to it.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_whole(file, hashlib.sha256(packed).digest() + packed)
    except OSError as error:
        logging.warning("A compiled kernel cannot be kept, and is compiled again: %s", error)
