"""Stands in for jax-triton on a machine without a GPU: kernels run in Triton's interpreter.

Importing it sets TRITON_INTERPRET, which must come before triton's first import.
"""

import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import jax
import ml_dtypes  # noqa: F401  (gives NumPy bfloat16)
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


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


def launch(kernel, grid, operands, outputs, **sizes):
    """Runs ``kernel`` on NumPy arrays; outputs are NaN where it writes nothing.

    Arrays lie between guards, which must stay untouched.
    """
    tensors, guards = [], []
    for array in (*operands, *(np.full(o.shape, np.nan, o.dtype) for o in outputs)):
        guarded = np.full(array.size + 128, 7, array.dtype)
        guarded[64:-64] = np.asarray(array).ravel()
        guards.append(guarded)
        tensors.append(Tensor(guarded[64:-64].reshape(array.shape)))
    kernel[grid](*tensors, **sizes)
    for guarded in guards:
        assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all()
    return [tensor.array for tensor in tensors[len(operands) :]]


def triton_call(*operands, kernel, out_shape, grid, num_warps, num_stages, name, **sizes):
    """jax_triton.triton_call, by a callback to the host."""
    del num_warps, num_stages, name

    def run(*arrays):
        return launch(kernel, grid, [np.asarray(a) for a in arrays], out_shape, **sizes)

    return jax.pure_callback(run, out_shape, *operands, vmap_method="sequential")


sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
