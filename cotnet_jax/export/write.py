"""Write an exported file that was run and compared before it gets its name."""

import dataclasses
import os
from collections.abc import Sequence

import jax

from cotnet_jax import files
from cotnet_jax.export import check
from cotnet_jax.export.errors import ExportError
from cotnet_jax.export.formats import Format, find_format
from cotnet_jax.export.options import Options, require_positive
from cotnet_jax.export.runtimes import runtime_of
from cotnet_jax.predictor import Predictor
from cotnet_jax.weights import Kind, read_weights
from cotnet_jax.weights.folder import lock_output


def export_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    format: Format | None = None,
    options: Options | None = None,
    *,
    kind: Kind | None = None,
    model: str | None = None,
    names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> None:
    """Write a network with its weights to a file for other programs, and print a report.

    The file is run on random images and compared with the model, where its runtime is installed,
    before it gets its name. On an error nothing is left of it. All runs on the CPU.

    Args:
      path, kind, model: as in ``cotnet_jax.load``.
      output: the file to create, .stablehlo or .onnx.
      format: "stablehlo" or "onnx"; None goes by the suffix of ``output``.
      options: what the file is to contain; None: the defaults of ``Options``.
      names: names of the classes, as in ``Predictor``.
      image_size: side of the network's input in pixels; None keeps that of the weights.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      OSError: ``output`` cannot be written, or another process is writing it.
      ValueError: the weights cannot be read or used, ``output`` exists or has another suffix, a
        package is missing, or the file does not compute what the model does or takes too much
        memory.
    """
    options = options or Options()
    require_positive("image_size", image_size)
    output = files.local(output)
    format = find_format(output, format)
    cpu = jax.local_devices(backend="cpu")[0]
    with lock_output(output), jax.default_device(cpu):
        weights = read_weights(path, kind, model)
        if image_size:
            settings = weights.settings | {"image_size": image_size}
            weights = dataclasses.replace(weights, settings=settings)
        predictor = Predictor(weights, names)
        print(*weights.notes, sep="\n")
        _report("building", f"{format}, {_describe(options)}")
        content, contents = _build(predictor, format, options)
        with files.writing_whole(output) as unfinished:
            unfinished.write_bytes(content)
            size = len(content)
            del content
            _check(unfinished, format, predictor, options)
    _report("wrote", f"{output}: {size:,} bytes, {contents}")


def _describe(options):
    kind = "resized and normalised inside" if options.preprocess else "normalised already"
    return ", ".join(
        [
            f"images {kind}",
            f"batch size {options.batch_size or 'any'}",
            "batch norms folded" if options.fold else "batch norms kept",
        ]
    )


def _build(predictor, format, options):
    """Return the content of a file, and what is in it, in words."""
    if format == "onnx":
        from cotnet_jax.export.onnx_format import graph, network

        proto = network.build(predictor, options)
        return (
            proto.SerializeToString(),
            f"{len(proto.graph.node)} nodes, opset {graph.OPSET}",
        )
    from cotnet_jax.export import stablehlo_format

    content = stablehlo_format.build(predictor, options)
    return content, f"for {', '.join(stablehlo_format.PLATFORMS)}"


def _check(path, format, predictor, options):
    runtime = runtime_of(format)
    if runtime is None:
        _report("unchecked", "ONNX Runtime is not installed: pip install onnxruntime")
        return
    _report("checking", f"with {runtime}")
    try:
        for comparison in check.compare(path, format, predictor, options):
            _report("checked", str(comparison))
    except MemoryError as error:
        raise ExportError(
            f"too little memory to run the file, so nothing was written ({error}): give a smaller "
            "--batch_size or --image_size"
        ) from None


def _report(step, text):
    print(f"{step:9} {text}", flush=True)
