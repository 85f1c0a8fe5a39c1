"""Exported files as functions, as other programs run them."""

import importlib.util
import os
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from cotnet_jax.export.formats import Format
from cotnet_jax.export.options import INPUT
from cotnet_jax.export.stablehlo_format import PROGRAM

# It is called a few times, and optimised code takes three times as long to compile.
FAST_COMPILATION = {"xla_backend_optimization_level": "0"}

Function = Callable[[np.ndarray], np.ndarray]


def runtime_of(format: Format) -> str | None:
    """Return name and version of what runs a file of this format; None where it is missing."""
    if format == "stablehlo":
        return f"JAX {jax.__version__}"
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


def open_file(path: str | os.PathLike, format: Format) -> Function:
    """Return the function from images to results that a file holds, on the CPU."""
    return _open_onnx(path) if format == "onnx" else _open_stablehlo(path)


def _open_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {INPUT: images})[0]


def _open_stablehlo(path):
    with zipfile.ZipFile(path) as archive:
        exported = jax.export.deserialize(bytearray(archive.read(PROGRAM)))
    call = jax.jit(exported.call, compiler_options=FAST_COMPILATION)
    return lambda images: np.asarray(call(images))
