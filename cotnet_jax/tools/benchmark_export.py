"""Measure exported ONNX files in ONNX Runtime, beside JAX, on this machine's CPU.

    python -m cotnet_jax.tools.benchmark_export [--models=cotnet50,...] [--batch_size=1]
        [--rounds=30] >> docs/performance/export.csv

Prints CSV: the fewest milliseconds of a call, over rounds in which all take turns, so that what
else the machine does strikes all of them alike. JAX runs the jitted network, ONNX Runtime the files
with batch norms kept and folded. Weights are by the goldens' formula. Both use all cores.
"""

import argparse
import functools
import os
import platform
import sys
import time

import jax
import numpy as np
import onnxruntime
from tqdm import tqdm

from cotnet_jax.export.formats import to_onnx
from cotnet_jax.export.options import INPUT
from cotnet_jax.tools import exported_models

# Seconds before a call: ONNX Runtime's threads keep the cores busy for a while after theirs.
PAUSE = 0.1
COLUMNS = "model,pixels,batch_size,jax_ms,onnx_ms,onnx_folded_ms,cores,versions"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cotnet_jax.tools.benchmark_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", default=",".join(exported_models.published()), metavar="NAME,..."
    )
    parser.add_argument("--batch_size", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=30, metavar="N")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    versions = f"Python {platform.python_version()} JAX {jax.__version__}"
    versions += f" ONNX Runtime {onnxruntime.__version__}"
    print(COLUMNS, flush=True)
    for name in arguments.models.split(","):
        model = exported_models.build(name, None, arguments.batch_size)
        fewest = measure(model, arguments.rounds)
        milliseconds = ",".join(f"{1e3 * seconds:.1f}" for seconds in fewest)
        pixels = model.images.shape[1]
        print(
            f"{name},{pixels},{arguments.batch_size},{milliseconds},{cores},{versions}", flush=True
        )
    return 0


def measure(model: exported_models.ExportedModel, rounds: int) -> list[float]:
    """Return the fewest seconds of JAX, of ONNX Runtime, and of it with folded batch norms."""
    predictor = model.predictor
    apply = jax.jit(predictor.model.apply)
    calls = [lambda: np.asarray(apply(predictor.variables, model.images))]
    for fold in (False, True):
        session = onnxruntime.InferenceSession(to_onnx(predictor, fold=fold, logits=True))
        calls.append(functools.partial(session.run, None, {INPUT: model.images}))
    seconds = np.full((rounds, len(calls)), np.inf)
    for call in calls:
        call()
    for row in tqdm(seconds, desc=model.name, leave=False):
        for index, call in enumerate(calls):
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            row[index] = time.perf_counter() - start
    return list(seconds.min(axis=0))


if __name__ == "__main__":
    sys.exit(main())
