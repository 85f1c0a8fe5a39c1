"""Stand in for jax-triton on a machine without a GPU: kernels run in Triton's interpreter.

Importing it sets TRITON_INTERPRET, which must come before triton's first import.
"""

import inspect
import os
import sys
import threading
import time
import types

os.environ["TRITON_INTERPRET"] = "1"

import jax
import ml_dtypes  # noqa: F401  (gives NumPy bfloat16)
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # (the interpreter looks for it where a kernel's home is)
from triton.runtime import interpreter

NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "uint8": "u8"}


class Tensor:
    """A NumPy array with the few methods of a torch tensor that the interpreter calls."""

    def __init__(self, array):
        self.array = array

    @property
    def dtype(self):
        return NAMES[self.array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def new_empty(self, size, device):
        del size, device
        return Tensor(self.array)

    def set_(self, storage, offset, size, stride):
        del storage, offset, size, stride

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's builder for programs that run side by side, each in a thread, and with the
    PTX of ``shared_memory``."""

    program = threading.local()

    @property
    def grid_idx(self):
        return self.program.index

    @grid_idx.setter
    def grid_idx(self, index):
        self.program.index = index
        # Words that were never stored are NaN in every float.
        self.program.words = np.full(48 * 1024 // 4, -1, np.int32)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        if is_volatile:
            time.sleep(0.001)  # the program waits for others
        arguments = (ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        return super().create_masked_load(*arguments)

    def create_inline_asm(self, inlineAsm, constraints, values, type, isPure, pack):
        del constraints, isPure, pack
        words, (address, *stored) = self.program.words, (v.data for v in values)
        result = np.zeros_like(address)
        if ".shared .align" in inlineAsm:
            assert int(inlineAsm.partition("[")[2].partition("]")[0]) <= words.nbytes
        elif inlineAsm.startswith("st.shared"):
            words[address // 4] = stored[0]
        else:
            assert inlineAsm.startswith("ld.shared"), inlineAsm
            result = words[address // 4]
        handle = interpreter.TensorHandle(result, type[0].scalar)
        return types.SimpleNamespace(get_result=lambda _: handle)


interpreter.interpreter_builder.__class__ = Builder

# The interpreter would put itself in the place of the language's functions again at each call of a
# function, which takes a quarter of the time.
interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda fn: types.SimpleNamespace(restore=lambda: None)
rewrite, rewriting = interpreter.InterpretedFunction.rewrite, threading.Lock()


def rewrite_one_at_a_time(self):
    """Python's compiler counts its depth for all threads together."""
    with rewriting:
        return rewrite(self)


interpreter.InterpretedFunction.rewrite = rewrite_one_at_a_time


def run_some(kernel, programs, numbers, arguments, sizes):
    """Runs those of a kernel's programs that have the ``numbers``; at the same time, if programs
    of the kernel wait for each other."""
    builder, function = interpreter.interpreter_builder, kernel.rewrite()
    threads, errors = [], []
    waiting = "arrived_ptr" in kernel.arg_names

    def run(index, arguments):
        builder.set_grid_idx(index, 0, 0)
        try:
            function(**arguments)
        except Exception as error:
            errors.append(error)

    def start(**arguments):
        builder.set_grid_dim(programs, 1, 1)
        index = numbers[builder.grid_idx[0]]
        if not waiting:
            builder.set_grid_idx(index, 0, 0)
            return function(**arguments)
        threads.append(threading.Thread(target=run, args=(index, arguments), daemon=True))
        if len(threads) == len(numbers):
            for thread in reversed(threads):
                thread.start()
            deadline = time.monotonic() + 120
            # After an error the others would wait for it.
            while any(t.is_alive() for t in threads) and not errors:
                assert time.monotonic() < deadline, "programs wait for ever"
                time.sleep(0.01)
            if errors:
                raise errors[0]

    start.__signature__ = inspect.signature(function)
    start.__annotations__ = function.__annotations__
    tensors = [Tensor(array) for array in arguments]
    interpreter.GridExecutor(start, kernel.arg_names, (len(numbers),))(*tensors, **sizes)


def poisoned(output, zeroed):
    """NaN, or what no counter reaches."""
    value = -(2**31) if output.dtype == "int32" else np.nan
    return np.full(output.shape, 0 if zeroed else value, output.dtype)


def launch(kernel, grid, operands, outputs, zeroed, **sizes):
    """Runs ``kernel`` on NumPy arrays; outputs but the ``zeroed`` are NaN where it writes nothing.

    Arrays lie between guards, which must stay untouched.
    """
    arrays, guards = [], []
    for array in (*operands, *(poisoned(o, i in zeroed) for i, o in enumerate(outputs))):
        guarded = np.full(array.size + 128, 7, array.dtype)
        guarded[64:-64] = np.asarray(array).ravel()
        guards.append(guarded)
        arrays.append(guarded[64:-64].reshape(array.shape))
    run_some(kernel, grid[0], range(grid[0]), arrays, sizes)
    for guarded in guards:
        assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all()
    return arrays[len(operands) :]


def triton_call(
    *operands, kernel, out_type, grid, num_warps, num_stages, name, zeroed_outputs=(), **sizes
):
    """jax_triton.triton_call, by a callback to the host."""
    del num_warps, num_stages, name

    def run(*arrays):
        return launch(
            kernel, grid, [np.asarray(a) for a in arrays], out_type, zeroed_outputs, **sizes
        )

    return jax.pure_callback(run, out_type, *operands, vmap_method="sequential")


sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call, __version__="none")
