"""The choice of an operation's implementation: XLA's form, or on NVIDIA GPUs its Triton kernels."""

import functools
import importlib
import sys
import warnings

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = (None, "xla", "triton")
JAX_TRITON = "0.3.1" if sys.version_info < (3, 12) else "0.4.1"
# Of arrays with fewer values, launching takes longer than what kernels save: XLA's own form goes
# into its CUDA graphs.
SMALLEST = 2**20
INSTALL = f"pip install 'jax-triton=={JAX_TRITON}' 'triton>=3.6,<3.8'"


def check_implementation(operation: str, implementation: str | None, *arrays: jax.Array) -> None:
    """Raise ValueError or TypeError where ``implementation`` is unknown or cannot run."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation must be one of {IMPLEMENTATIONS}, not {implementation!r}"
        )
    dtypes = {str(a.dtype) for a in arrays if not _kernel_takes(a.dtype)}
    if implementation == "triton" and dtypes:
        raise TypeError(
            f"{operation}: implementation='triton' takes bfloat16, float16 and float32, not "
            f"{', '.join(sorted(dtypes))}; use implementation='xla'"
        )


def uses_kernels(implementation: str | None, *operands: jax.Array) -> bool:
    """Return whether ``dispatch`` calls a kernel with the operands, where it runs on a GPU.

    With no implementation forced, kernels are for large arrays; the first operand tells.
    """
    if implementation == "xla" or operands[0].size == 0:
        return False
    return implementation == "triton" or (
        operands[0].size >= SMALLEST
        and kernel_available()
        and all(_kernel_takes(a.dtype) for a in operands)
    )


def dispatch(launch, implementation, kernel, xla, *operands, **constants):
    """Call the function named ``kernel`` of the module ``launch``, or ``xla``, with the operands.

    The module, given by its dotted name, is imported only where a kernel is to run: it needs JAX
    with CUDA. With no implementation forced the choice falls at lowering, by platform, so that one
    traced function runs on either.
    """
    xla = functools.partial(xla, **constants)
    if not uses_kernels(implementation, *operands):
        return xla(*operands)
    triton = functools.partial(getattr(_import(launch), kernel), **constants)
    if implementation == "triton":
        return triton(*operands)
    return lax.platform_dependent(*operands, cuda=triton, default=xla)


def _kernel_takes(dtype):
    return dtype in (jnp.bfloat16, jnp.float16, jnp.float32)


def _import(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"implementation='triton' needs JAX with CUDA, and {INSTALL}: {error}"
        ) from error


@functools.cache
def kernel_available() -> bool:
    """Return whether kernels run here, with one warning where only software is missing."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return False
    try:
        _import("cotnet_jax.ops.triton_call")
    except ImportError as error:
        warnings.warn(
            f"networks run in their slower XLA form, without the GPU kernels. {error}",
            stacklevel=2,
        )
        return False
    return True
