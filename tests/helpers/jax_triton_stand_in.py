"""Stand in for the part of jax-triton that is wrapped, in its two shapes; Triton itself is real.

Importing jax-triton needs JAX with CUDA.
"""

import dataclasses
import sys
import types

from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import code_generator, compiler

knobs.compilation.disable_line_info = True


@dataclasses.dataclass
class CompilationResult:
    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None
    llir: str | None


@dataclasses.dataclass
class NewerCompilationResult(CompilationResult):
    global_scratch_size: int | None = None
    tensordesc_meta: tuple = ()


class JaxTriton:
    """jax_triton of a version, as ``sys.modules`` has it from now on.

    Attributes:
      compiled: names of the kernels that were compiled.
    """

    def __init__(self, version: str):
        self.__name__, self.__version__ = "jax_triton", version
        self.compiled: list[str] = []
        library = types.SimpleNamespace(
            tc=compiler,
            CompilationResult=CompilationResult,
            compile_ttir_inplace=self._compile_ttir_inplace,
            _JAX_TRITON_DUMP_DIR=None,
        )
        self._generates_by_source = version >= "0.4"
        if self._generates_by_source:
            library.CompilationResult = NewerCompilationResult
        else:
            library.code_gen = code_generator
        self.triton_lib = library
        sys.modules["jax_triton"] = self

    def compile(self, kernel, signature, constants, attrs=None, capability=90, **options):
        """Returns the kernel's text and CompilationResult, as jax-triton's lowering has them."""
        library = self.triton_lib
        target = GPUTarget("cuda", capability, 32)
        backend = nvidia.CUDABackend(target)
        options = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        source = library.tc.ASTSource(kernel, signature, constants, attrs or {})
        modules = backend.get_module_map()
        if self._generates_by_source:
            module = source.make_ir(target, options, functions, modules, context)
        else:
            module = library.code_gen.ast_to_ttir(
                kernel,
                source,
                options=options,
                codegen_fns=functions,
                context=context,
                module_map=modules,
            )
        text = str(module)
        return text, library.compile_ttir_inplace(module, backend, options, capability)

    def _compile_ttir_inplace(self, ttir, backend, options, capability):
        metadata = {}
        module = backend.make_ttir(ttir, metadata, options, capability)
        module = backend.make_ttgir(module, metadata, options, capability)
        module = backend.make_llir(module, metadata, options, capability)
        ptx = backend.make_ptx(module, metadata, options, capability)
        self.compiled.append(metadata["name"])
        return self.triton_lib.CompilationResult(
            binary=ptx,
            name=metadata["name"],
            shared_mem_bytes=metadata["shared"],
            ttgir="",
            llir="",
        )
