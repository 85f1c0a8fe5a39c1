"""Triton kernels of a traced program, compiled side by side."""

import concurrent.futures
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

PRIMITIVE = "triton_kernel_call"


def lower(traced: jax.stages.Traced) -> jax.stages.Lowered:
    """Lower a traced program; on GPUs its kernels are compiled side by side before."""
    if jax.default_backend() == "gpu":
        compile_kernels(traced)
    return traced.lower()


def compile_kernels(traced: jax.stages.Traced) -> int:
    """Compile the Triton kernels of a program, before it is lowered for CUDA.

    Lowering would compile one after the other. Triton releases Python's lock while it compiles, so
    threads are enough. Kernels that were compiled before, in this process or another one, are not
    compiled again.

    Args:
      traced: from ``jax.jit(function).trace(...)``.

    Returns:
      Number of different calls of kernels in the program.
    """
    calls = {_identify(equation): equation for equation in _find_calls(traced.jaxpr.jaxpr)}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # Raises what compiling raises.
        list(pool.map(_lower, calls.values()))
    return len(calls)


def _find_calls(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations that call a kernel, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == PRIMITIVE:
            yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(leaf):
                yield from _find_calls(getattr(leaf, "jaxpr", leaf))


def _is_program(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def _identify(equation: Any) -> tuple:
    """Return what two calls of the same kernel have in common."""
    operands = tuple((v.aval.shape, v.aval.dtype) for v in equation.invars)
    return operands, tuple(sorted(equation.params.items(), key=lambda item: item[0]))


def _lower(equation: Any) -> None:
    """Lower a call alone, as a program; jax-triton keeps the kernel for the next time."""
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    call = functools.partial(equation.primitive.bind, **equation.params)
    jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",))
