"""The one door to jax-triton. Importing this module needs triton, jax-triton and JAX with CUDA."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax_triton

from cotnet_jax.ops.kernel_cache import keep_compiled_kernels
from cotnet_jax.ops.varying import vary

# What jax-triton 0.3 calls out_shape is out_type in 0.4.
_PARAMETERS = inspect.signature(jax_triton.triton_call).parameters
RESULTS = "out_type" if "out_type" in _PARAMETERS else "out_shape"


# Compute capabilities of GPUs with 64 or 99 KiB of shared memory for a program, where others have
# 163 and more.
SMALL_SHARED_MEMORY = ("7.5", "8.6", "8.9", "12.0", "12.1")


@functools.cache
def most_stages() -> int:
    """Return how many blocks a kernel that was tuned on an H100 may have on their way here."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        # Lowered for a GPU elsewhere.
        return 3
    small = any(device.compute_capability in SMALL_SHARED_MEMORY for device in devices)
    return 2 if small else 3


def call_kernel(
    kernel: Any,
    programs: int,
    num_warps: int,
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.Array | jax.ShapeDtypeStruct],
    *,
    name: str,
    zeroed_outputs: Sequence[int] = (),
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Launch a Triton kernel.

    Args:
      kernel: a function under ``triton.jit``. It takes pointers to the operands, then to the
        results, and the constants.
      programs: size of the grid.
      num_warps: of each program.
      operands: arrays of any shape, in row-major order.
      outputs: what has the results' shapes and dtypes.
      name: of the call, in profiles.
      zeroed_outputs: indices of results that are 0 when the kernel starts; others hold anything.
      **constants: the kernel's ``tl.constexpr`` parameters; hashable.

    Returns:
      Arrays like ``outputs``, varying over those axes of an enclosing shard_map that any of the
      operands varies over.
    """
    keep_compiled_kernels()
    results = jax_triton.triton_call(
        *operands,
        kernel=kernel,
        grid=(programs,),
        num_warps=num_warps,
        # Of the loops that do not say themselves how much they load ahead.
        num_stages=1,
        name=name,
        zeroed_outputs=zeroed_outputs,
        **{RESULTS: [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs]},
        **constants,
    )
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    return tuple(vary(result, varying) for result in results)
