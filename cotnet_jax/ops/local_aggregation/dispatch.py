"""The choice of an aggregation's implementation: XLA's, or on NVIDIA GPUs the Triton kernels."""

import functools
import sys
import warnings

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = (None, "xla", "triton")
JAX_TRITON = "0.3.1" if sys.version_info < (3, 12) else "0.4.1"
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


def dispatch(implementation, kernel, xla, *operands, **constants):
    """Call ``launch``'s function named ``kernel``, or ``xla``, with the operands.

    With no implementation forced the choice falls at lowering, by platform, so that one traced
    function runs on either.
    """
    xla = functools.partial(xla, **constants)
    if implementation == "xla" or operands[0].size == 0:
        return xla(*operands)
    if implementation is None and not (
        kernel_available() and all(_kernel_takes(a.dtype) for a in operands)
    ):
        return xla(*operands)
    triton = functools.partial(getattr(_triton(), kernel), **constants)
    if implementation == "triton":
        return triton(*operands)
    return lax.platform_dependent(*operands, cuda=triton, default=xla)


def _kernel_takes(dtype):
    return dtype in (jnp.bfloat16, jnp.float16, jnp.float32)


def _triton():
    """Return the kernels' module, imported only where it is to run: it needs JAX with CUDA."""
    try:
        from cotnet_jax.ops.local_aggregation.triton import launch
    except ImportError as error:
        raise ImportError(
            f"implementation='triton' needs JAX with CUDA, and {INSTALL}: {error}"
        ) from error
    return launch


@functools.cache
def kernel_available() -> bool:
    """Return whether the kernels run here, with one warning where only software is missing."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return False
    try:
        _triton()
    except ImportError as error:
        warnings.warn(
            f"local aggregation runs in its slower XLA form, without its GPU kernel. {error}",
            stacklevel=2,
        )
        return False
    return True
