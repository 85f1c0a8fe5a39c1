"""The formats of exported files, and what each of them needs."""

import importlib.util
import pathlib
from typing import TYPE_CHECKING, Literal, get_args

from cotnet_jax.export.errors import ExportError

if TYPE_CHECKING:
    from cotnet_jax.predictor import Predictor

Format = Literal["stablehlo", "onnx"]
# Names of files end in a dot and the name of the format.
FORMATS: tuple[Format, ...] = get_args(Format)
_PACKAGES = {"stablehlo": "flatbuffers", "onnx": "onnx"}
_INSTALL = "pip install 'cotnet_jax[export]'"


def find_format(output: pathlib.Path, wanted: Format | None = None) -> Format:
    """Return the format that the suffix of a file names, once all that it needs is there.

    Args:
      output: the file to be made.
      wanted: its format, where it was said.

    Raises:
      ExportError: lists all that is wrong: another suffix, a file that exists, a missing package.
    """
    by_suffix = {f".{format}": format for format in FORMATS}
    format = wanted or by_suffix.get(output.suffix)
    problems = []
    if wanted and wanted not in FORMATS:
        raise ExportError(f"format must be {' or '.join(FORMATS)}, not {wanted!r}")
    if output.suffix not in by_suffix or by_suffix[output.suffix] != format:
        suffixes = f".{wanted}" if wanted else " or ".join(by_suffix)
        problems.append(f"--output={output} must end in {suffixes}")
    if output.exists():
        problems.append(f"{output} exists: delete it or give another --output")
    if format and not importlib.util.find_spec(_PACKAGES[format]):
        problems.append(f"{format} needs the package {_PACKAGES[format]}; type: {_INSTALL}")
    if problems or format is None:
        raise ExportError("; ".join(problems))
    return format


def to_onnx(
    predictor: "Predictor",
    *,
    fold: bool = False,
    preprocess: bool = False,
    batch_size: int | None = None,
    logits: bool = False,
) -> bytes:
    """Return a network with its weights as the content of an ONNX file.

    Its input "images" and its output "probabilities" or "logits" [N, classes], float32, are as
    ``Options`` says. Opset 18, which ONNX Runtime reads since 1.14. The metadata holds the
    description of ``describe``, each value that is no text in JSON.

    Args:
      predictor: the network.
      fold, preprocess, batch_size, logits: as in ``Options``.

    Raises:
      ImportError: onnx is not installed.
      TypeError: ``predictor`` is none.
      ExportError: there is no classifier, or an option cannot be used.
    """
    from cotnet_jax.export.onnx_format.network import build
    from cotnet_jax.export.options import Options

    _require_predictor(predictor)
    return build(predictor, Options(fold, preprocess, batch_size, logits)).SerializeToString()


def to_stablehlo(
    predictor: "Predictor",
    *,
    fold: bool = False,
    preprocess: bool = False,
    batch_size: int | None = None,
    logits: bool = False,
) -> bytes:
    """Return a network with its weights as the content of a StableHLO file.

    It is a zip archive: see ``stablehlo_format``, and docs/export.md for the lines that load it.
    For CPUs, NVIDIA GPUs and TPUs. Arguments are those of ``to_onnx``.

    Raises:
      ImportError: flatbuffers is not installed.
      TypeError, ExportError: as in ``to_onnx``.
    """
    from cotnet_jax.export.options import Options
    from cotnet_jax.export.stablehlo_format import build

    _require_predictor(predictor)
    return build(predictor, Options(fold, preprocess, batch_size, logits))


def _require_predictor(predictor):
    from cotnet_jax.predictor import Predictor

    if not isinstance(predictor, Predictor):
        raise TypeError(
            "give a Predictor, such as cotnet_jax.Predictor.load(PATH), not a "
            f"{type(predictor).__name__}"
        )
