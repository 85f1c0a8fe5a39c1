"""Compare exported files of every published variant with the goldens, and with JAX.

    python -m cotnet_jax.tools.check_export tests/goldens [--models=cotnet50,...]

Weights and images are by the goldens' formulas. Each variant is written as ONNX and as StableHLO,
batch norms kept and folded, and run on 1, 3 and 8 images: ONNX in ONNX Runtime, StableHLO in a
process that imports JAX and NumPy alone. Prints a line for each file: bytes, nodes, and the
relative L2 errors of the logits, against the PyTorch original's where the goldens have them, and
against JAX in float32. Exits with 1 if any is above 1e-4.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from cotnet_jax.export.formats import FORMATS
from cotnet_jax.export.options import Options
from cotnet_jax.export.runtimes import FAST_COMPILATION, open_file
from cotnet_jax.tools import exported_models
from cotnet_jax.tools.goldens import relative_error

BATCH_SIZES = (1, 3, 8)
TOLERANCE = 1e-4
# What a program without this package does: see docs/export.md.
_LOAD_AND_RUN = """
import sys, zipfile
import jax, numpy as np
path, images, output, *batch_sizes = sys.argv[1:]
with zipfile.ZipFile(path) as archive:
    call = jax.jit(jax.export.deserialize(bytearray(archive.read("program.jax_export"))).call)
images = np.load(images)
np.savez(output, *[call(images[: int(size)]) for size in batch_sizes])
assert not any(name.startswith("cotnet_jax") for name in sys.modules)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.check_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("goldens", type=Path, metavar="FOLDER", help="tests/goldens")
    parser.add_argument("--models", metavar="NAME,...", help="some of them; by default all")
    arguments = parser.parse_args()
    models = exported_models.find(arguments.goldens)
    names = arguments.models.split(",") if arguments.models else list(models)
    unknown = [name for name in names if name not in models]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; they are {', '.join(models)}")
    print(
        f"{'model':26} {'format':10} {'folded':7} {'bytes':>13} {'nodes':>6} "
        f"{'batch':>6} {'to goldens':>11} {'to JAX':>9}"
    )
    failures = 0
    for name in names:
        for line, errors in check(exported_models.build(name, models[name], max(BATCH_SIZES))):
            # A NaN is never within its tolerance.
            good = all(error <= TOLERANCE for error in errors)
            failures += not good
            print(f"{name:26} {line}{'' if good else '  ABOVE'}", flush=True)
    print(f"{failures} of the errors above {TOLERANCE:.0e}")
    return int(failures > 0)


def check(model: exported_models.ExportedModel) -> Iterator[tuple[str, list[float]]]:
    """Yield a line and its errors for each file and batch size of a model."""
    predictor = model.predictor
    apply = jax.jit(predictor.model.apply, compiler_options=FAST_COMPILATION)
    expected = np.asarray(apply(predictor.variables, model.images))
    for format in FORMATS:
        for fold in (False, True):
            options = Options(fold=fold, logits=True)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, f"{model.name}.{format}")
                nodes = _write(file, format, predictor, options)
                size = file.stat().st_size
                run = _run_onnx if format == "onnx" else _run_stablehlo
                results = run(file, model.images)
            for count, logits in zip(BATCH_SIZES, results, strict=True):
                known = model.logits[:count]
                errors = [relative_error(logits, expected[:count])]
                shown = "-"
                if len(known):
                    errors.append(relative_error(logits[: len(known)], known))
                    shown = f"{errors[-1]:.1e}"
                line = f"{format:10} {'yes' if fold else 'no':7} {size:13,} {nodes:>6} {count:6}"
                yield f"{line} {shown:>11} {errors[0]:9.1e}", errors


def _write(file, format, predictor, options):
    """Write a file, and return the number of its nodes."""
    if format == "onnx":
        from cotnet_jax.export.onnx_format.network import build

        model = build(predictor, options)
        file.write_bytes(model.SerializeToString())
        return len(model.graph.node)
    from cotnet_jax.export import stablehlo_format

    file.write_bytes(stablehlo_format.build(predictor, options))
    return "-"


def _run_onnx(file, images):
    run = open_file(file, "onnx")
    return [run(images[:count]) for count in BATCH_SIZES]


def _run_stablehlo(file, images):
    inputs, outputs = file.with_suffix(".npy"), file.with_suffix(".npz")
    np.save(inputs, images)
    # -I: the folder that it is started in is not searched for packages either.
    command = [sys.executable, "-I", "-c", _LOAD_AND_RUN, file, inputs, outputs]
    flags = " ".join(f"--{name}={value}" for name, value in FAST_COMPILATION.items())
    subprocess.run(
        [*map(str, [*command, *BATCH_SIZES])], check=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    with np.load(outputs) as results:
        return [results[name] for name in results.files]


if __name__ == "__main__":
    sys.exit(main())
