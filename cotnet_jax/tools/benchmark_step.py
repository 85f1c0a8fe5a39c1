"""Speed of a configuration's training step on this machine, and what its parts cost.

    python -m cotnet_jax.tools.benchmark_step --config=configs/cotnet50.py
        [--forms=as configured,...] [--trace=DIR] [--config.batch_size=256 --config.FIELD=VALUE ...]

Prints one line for each form of the step: milliseconds, images a second, and the time against
the step as configured. The batch is noise with the dataset's classes (ImageNet itself need not be
there), made once, and stays on the device, so that the pipeline is left out. --trace writes a
profile of a few steps as configured, for TensorBoard or xprof.
"""

import concurrent.futures
import copy
import dataclasses
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from cotnet_jax.distributed import sharding
from cotnet_jax.training import loop, setup
from cotnet_jax.training.optimizer import make_optimizer

AS_CONFIGURED = "as configured"
STEPS, ROUNDS = 10, 5


def without_mixing(config, model):
    config.mixing.probability = 0.0
    return model


def without_averages(config, model):
    config.ema.decay = 0.0
    return model


def without_fusion(config, model):
    del config
    return model.clone(fused=False)


def without_kernels(config, model):
    del config
    return model.clone(implementation="xla")


FORMS = {
    AS_CONFIGURED: lambda config, model: model,
    "without mixing": without_mixing,
    "without EMA": without_averages,
    "separate group norm": without_fusion,
    "without kernels": without_kernels,
}


def set_up_training(config: ml_collections.ConfigDict) -> setup.TrainSetup:
    """What a configuration resolves to, with noise in place of its images."""
    config.data.fake = True
    return setup.set_up_training(config)


def trace_step(setup: setup.TrainSetup, form: str, optimizer, batch):
    """The step of a form, not compiled yet, and whether its state has EMA."""
    config = copy.deepcopy(setup.config)
    model = FORMS[form](config, setup.model)
    setup = dataclasses.replace(setup, config=config, model=model)
    shapes = loop.abstract_train_state(setup, optimizer)
    return loop.make_step(setup, optimizer).lower(shapes, batch), shapes.ema is not None


def compile_forms(traced: dict) -> dict:
    """The compiled steps. The first alone: with a compilation cache the others find what XLA
    measured for it, and are then compiled side by side."""
    first, *others = traced
    compiled = {first: traced[first][0].compile()}
    logging.info("compiled %r", first)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = pool.map(lambda form: traced[form][0].compile(), others)
        return compiled | dict(zip(others, steps, strict=True))


def make_batch(setup: setup.TrainSetup):
    """A batch of noise, on the devices."""
    config, random = setup.config, np.random.default_rng(0)
    side, rows = config.data.image_size, config.batch_size // jax.process_count()
    batch = {
        "image": random.integers(0, 256, (rows, side, side, 3), np.uint8),
        "label": random.integers(0, setup.model.num_classes, rows, np.int32),
    }
    return sharding.shard_batch(setup.mesh, batch)


def run(step, state, batch, count):
    """State after ``count`` steps, and seconds a step."""
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return state, (time.perf_counter() - start) / count


def benchmark(config: ml_collections.ConfigDict, forms: list[str], trace: str) -> None:
    setup = set_up_training(config)
    devices = setup.mesh.devices.flatten()
    print(
        f"{config.model.name}, {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}, "
        f"{setup.model.dtype.name}, batch {config.batch_size}, {config.data.image_size} pixels"
    )
    optimizer = make_optimizer(config.optimizer, setup.rates, setup.steps_per_epoch)
    batch = make_batch(setup)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Made meanwhile.
        first = pool.submit(loop.create_train_state, setup, optimizer)
        traced = {form: trace_step(setup, form, optimizer, batch) for form in forms}
        passed = time.perf_counter() - start
        logging.info("traced %d forms in %.0f s; compiling", len(forms), passed)
        compiled = compile_forms(traced)
    logging.info("compiled after %.0f s", time.perf_counter() - start)
    memory = compiled[forms[0]].memory_analysis()
    if memory is not None:
        used = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9
        print(f"device memory of the step: {used:.1f} GB")
    first, states = first.result(), {}
    for form, step in compiled.items():
        # A step takes its state's memory, so that each form needs its own.
        state = jax.tree.map(jnp.copy, first if traced[form][1] else first.replace(ema=None))
        states[form], each = run(step, state, batch, 1)
        logging.info("first step of %r: %.1f s", form, each)
        states[form], each = run(step, states[form], batch, 2)
        left = (ROUNDS * STEPS * len(forms)) * each
        logging.info("then %.0f ms a step; about %.0f s for all steps", each * 1e3, left)
    seconds = {form: [] for form in forms}
    # In turn: a device that grows warm must not favour the first.
    for _ in range(ROUNDS):
        for form, step in compiled.items():
            states[form], each = run(step, states[form], batch, STEPS)
            seconds[form].append(each)
    first = statistics.median(seconds[forms[0]])
    print(f"{'form':25} {'ms':>8} {'images/s':>9} {'of first':>8}", flush=True)
    for form, each in seconds.items():
        median = statistics.median(each)
        print(
            f"{form:25} {median * 1e3:8.2f} {config.batch_size / median:9.0f} {median / first:8.3f}"
        )
    if trace:
        with jax.profiler.trace(trace):
            run(compiled[forms[0]], states[forms[0]], batch, 3)
        print(f"profile in {trace}")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    unknown = [form for form in FORMS_FLAG.value if form not in FORMS]
    if unknown:
        sys.exit(f"error: --forms: no {', '.join(unknown)}; there are {', '.join(FORMS)}")
    try:
        benchmark(CONFIG.value, FORMS_FLAG.value, TRACE.value)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    FORMS_FLAG = flags.DEFINE_list("forms", list(FORMS), "Forms of the step to time, by comma.")
    TRACE = flags.DEFINE_string("trace", "", "Folder to write a profile to.")
    flags.mark_flag_as_required("config")
    app.run(main)
