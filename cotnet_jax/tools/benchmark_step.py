"""Measure a configuration's training step on this machine, and the cost of its parts.

The command is ``cotnet-benchmark``, or ``python -m cotnet_jax.tools.benchmark_step``. It prints one
line for each variant of the step: milliseconds, images a second, and the time relative to the step
as configured. The batch is noise with the dataset's classes (ImageNet itself need not be there),
made once and kept on the device, so that the input pipeline is left out. --trace writes a profile
of a few steps as configured, for TensorBoard or xprof.
"""

import concurrent.futures
import copy
import dataclasses
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.config import weight_kinds
from cotnet_jax.distributed import sharding
from cotnet_jax.models import parameter_names
from cotnet_jax.ops.compile_kernels import lower
from cotnet_jax.training import setup as training_setup
from cotnet_jax.training.loop import build_optimizer, build_train_step
from cotnet_jax.training.setup import TrainSetup
from cotnet_jax.training.state import abstract_train_state, create_train_state

AS_CONFIGURED = "as configured"
STEPS, ROUNDS = 10, 5


def without_mixing(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    config.mixing.probability = 0.0
    return model


def without_ema(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    config.ema.decay = 0.0
    return model


def without_fusion(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    del config
    return model.clone(fused=False)


def without_kernels(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    del config
    return model.clone(implementation="xla")


def frozen_backbone(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    config.finetune.freeze = "stem|stage.*"
    return model


def frozen_up_to_stage_2(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    config.finetune.freeze = "stem|stage[12].*"
    return model


# Each changes a copy of the configuration and returns the network.
VARIANTS = {
    AS_CONFIGURED: lambda config, model: model,
    "without mixing": without_mixing,
    "without EMA": without_ema,
    "separate group norm": without_fusion,
    "without kernels": without_kernels,
    "frozen backbone": frozen_backbone,
    "frozen up to stage 2": frozen_up_to_stage_2,
}


def set_up_training(config: ml_collections.ConfigDict) -> TrainSetup:
    """Return what a configuration resolves to, with noise in place of its images."""
    config.data.fake = True
    return training_setup.set_up_training(config)


def set_up_variant(setup: TrainSetup, variant: str) -> TrainSetup:
    """Return what a variant's configuration resolves to."""
    config = copy.deepcopy(setup.config)
    model = VARIANTS[variant](config, setup.model)
    evaluation = dataclasses.replace(setup.eval, config=config, model=model)
    return dataclasses.replace(setup, eval=evaluation)


def trace_step(setup: TrainSetup, batch: dict) -> jax.stages.Traced:
    """Return the train step, not lowered yet."""
    optimizer = build_optimizer(setup)
    state = abstract_train_state(setup, optimizer)
    return build_train_step(setup, optimizer).trace(state, batch)


def copy_state(setup: TrainSetup, state: TrainState) -> TrainState:
    """Return a copy of the state of the step as configured, for a variant of it."""
    trained, _ = parameter_names.split(state.params, setup.groups.frozen)
    state = state.replace(
        ema=state.ema if "ema" in weight_kinds(setup.config) else None,
        opt_state=sharding.replicate(setup.mesh, build_optimizer(setup).init(trained)),
    )
    return jax.tree.map(jnp.copy, state)


def compile_variants(
    lowered: dict[str, jax.stages.Lowered],
) -> dict[str, jax.stages.Compiled]:
    """Compile the steps: the first alone, the others at the same time.

    With a compilation cache the others then find what XLA measured for the first one.
    """
    first, *others = lowered
    compiled = {first: lowered[first].compile()}
    logging.info("compiled %r", first)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = pool.map(lambda variant: lowered[variant].compile(), others)
        return compiled | dict(zip(others, steps, strict=True))


def make_batch(setup: TrainSetup) -> dict[str, jax.Array]:
    """Return a batch of noise, on the devices."""
    config, random = setup.config, np.random.default_rng(0)
    size, rows = config.data.image_size, config.batch_size // jax.process_count()
    batch = {
        "image": random.integers(0, 256, (rows, size, size, 3), np.uint8),
        "label": random.integers(0, setup.model.num_classes, rows, np.int32),
    }
    return sharding.shard_batch(setup.mesh, batch)


def _memory_of(step: jax.stages.Compiled) -> str:
    """Return the device memory of a step, its arguments included, in GB; "" if unknown."""
    memory = step.memory_analysis()
    if memory is None:
        return ""
    return f"{(memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9:.2f}"


def run(step, state: TrainState, batch: dict, count: int) -> tuple[TrainState, float]:
    """Return the state after ``count`` steps, and the seconds per step."""
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return state, (time.perf_counter() - start) / count


def benchmark(
    config: ml_collections.ConfigDict, variants: list[str] | None = None, trace: str | None = None
) -> None:
    """Print the table.

    Args:
      config: as in configs/default.py.
      variants: names of ``VARIANTS``; by default all.
      trace: folder to write a profile to.

    Raises:
      ValueError: an unknown variant, or a configuration that cannot be used.
    """
    variants = variants or list(VARIANTS)
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise ValueError(f"--variants: no {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    setup = set_up_training(config)
    devices = setup.mesh.devices.flatten()
    print(
        f"{config.model.name}, {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}, "
        f"{setup.model.dtype.name}, batch {config.batch_size}, {config.data.image_size} pixels"
    )
    setups = {variant: set_up_variant(setup, variant) for variant in variants}
    batch = make_batch(setup)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Made in the meantime.
        first_state = pool.submit(create_train_state, setup, build_optimizer(setup))
        lowered = {variant: lower(trace_step(setups[variant], batch)) for variant in variants}
        passed = time.perf_counter() - start
        logging.info("lowered %d variants in %.0f s; compiling", len(variants), passed)
        compiled = compile_variants(lowered)
    logging.info("compiled after %.0f s", time.perf_counter() - start)
    states: dict[str, TrainState] = {}
    for variant, step in compiled.items():
        # A step donates its state, so that each variant needs its own.
        state = copy_state(setups[variant], first_state.result())
        states[variant], each = run(step, state, batch, 1)
        logging.info("first step of %r: %.1f s", variant, each)
        states[variant], each = run(step, states[variant], batch, 2)
        left = (ROUNDS * STEPS * len(variants)) * each
        logging.info("then %.0f ms a step; about %.0f s for all steps", each * 1e3, left)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    # In turn: a device that grows warm must not favour the first.
    for _ in range(ROUNDS):
        for variant, step in compiled.items():
            states[variant], each = run(step, states[variant], batch, STEPS)
            seconds[variant].append(each)
    first = statistics.median(seconds[variants[0]])
    print(f"{'variant':25} {'ms':>8} {'images/s':>9} {'of first':>8} {'GB':>7}", flush=True)
    for variant, each in seconds.items():
        median = statistics.median(each)
        print(
            f"{variant:25} {median * 1e3:8.2f} {config.batch_size / median:9.0f} "
            f"{median / first:8.3f} {_memory_of(compiled[variant]):>7}"
        )
    if trace:
        with jax.profiler.trace(trace):
            run(compiled[variants[0]], states[variants[0]], batch, 3)
        print(f"profile in {trace}")


if __name__ == "__main__":
    from cotnet_jax.commands.benchmark import main

    main()
