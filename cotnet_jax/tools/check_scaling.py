"""Check that training does not depend on how many GPUs and processes there are.

    python -m cotnet_jax.tools.check_scaling [--model=cotnet50] [--devices=1,2,4,8]

Ten steps in float32 of the recipe, with BatchNorm synchronised and without mixing and dropping,
which each device draws for itself, on the same images and from the same weights: on each number of
GPUs of this host, in one process and in one process for each, with the Triton kernels and without.
A line says how far weights and running statistics are from those of the first arrangement (the
largest relative L2 difference of an array) and how far a second run is from the first, "none" where
it gives the same bits. Exits with 1 where a difference is above 1e-5. Without GPUs the cores of the
CPU are shared, and there are no kernels.

Sums over devices round in another order, and so do two runs of a GPU, whose gradients are added as
they come unless XLA_FLAGS has --xla_gpu_deterministic_ops=true. ReLU and maximum pools make more of
it with each step: where rounding moves a value over the kink, its whole gradient changes. So the
networks have SiLU and average pools in their place, as those of `check_kernels models
--passes=smooth`; --kinks keeps them as they are.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cotnet_jax.command_line import Parser
from cotnet_jax.configs import default
from cotnet_jax.distributed import sharding
from cotnet_jax.distributed.initialize import is_first_process
from cotnet_jax.models.cotnet import list_models
from cotnet_jax.tools import arrangements, benchmark_model, benchmark_step
from cotnet_jax.tools.arrangements import Arrangement, ArrangementError
from cotnet_jax.tools.check_kernels import smooth
from cotnet_jax.training.loop import build_optimizer, build_train_step
from cotnet_jax.training.state import create_train_state

MODULE = "cotnet_jax.tools.check_scaling"
STEPS, TOLERANCE = 10, 1e-5
# Biases in front of a BatchNorm have no gradient but rounding, and stay about 0.
SMALLEST_NORM = 1e-3


def train_here(task: dict[str, Any]) -> None:
    """Take ten steps on all devices of all processes; the first process writes the weights."""
    # Not TF32, which GPUs take for float32 by themselves.
    jax.config.update("jax_default_matmul_precision", "highest")
    config = default.get_config()
    config.model.name, config.model.dtype = task["model"], "float32"
    config.model.sync_batch_norm = True
    # Each device draws these for itself.
    config.mixing.probability = config.model.drop_rate = config.model.drop_path_rate = 0.0
    config.batch_size, config.data.image_size = task["batch_size"], task["size"]
    setup = benchmark_step.set_up_training(config)
    setup = benchmark_model.with_implementation(setup, task["implementation"])
    optimizer = build_optimizer(setup)
    state, step = create_train_state(setup, optimizer), build_train_step(setup, optimizer)
    rows = config.batch_size // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    # The networks are traced inside it.
    with contextlib.nullcontext() if task["kinks"] else smooth():
        for number in range(STEPS):
            random = np.random.default_rng(number)
            shape = (config.batch_size, *(config.data.image_size,) * 2, 3)
            batch = {
                "image": random.integers(0, 256, shape, np.uint8)[mine],
                "label": random.integers(0, setup.model.num_classes, shape[0], np.int32)[mine],
            }
            state, _ = step(state, sharding.shard_batch(setup.mesh, batch))
    arrays = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    if is_first_process():
        named, _ = jax.tree_util.tree_flatten_with_path(arrays)
        np.savez(task["file"], **{jax.tree_util.keystr(path): array for path, array in named})


def train(task: dict[str, Any], arrangement: Arrangement, seconds: float) -> dict[str, np.ndarray]:
    """Return the weights and statistics, by their names, that an arrangement makes.

    Raises:
      ArrangementError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.npz"
        arrangements.run(MODULE, arrangement, task | {"file": str(file)}, seconds)
        with np.load(file) as arrays:
            return dict(arrays)


def difference(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return the largest relative L2 difference of an array; infinite where one is not finite."""
    errors: list[float] = []
    for name, wanted in expected.items():
        norm = max(float(np.linalg.norm(wanted)), SMALLEST_NORM)
        errors.append(float(np.linalg.norm(arrays[name] - wanted)) / norm)
    return max(errors) if np.isfinite(errors).all() else np.inf


def main(arguments: list[str]) -> int:
    task = arrangements.this_process()
    if task:
        train_here(task)
        arrangements.pass_on(None)
        return 0
    command = f"python -m {MODULE}"
    parser = Parser(
        "Check that training does not depend on how many GPUs and processes there are.",
        [command, f"{command} --model=se_cotnetd_152 --devices=1,8 --batch_size=128"],
        notes="The module's docstring says what is compared.",
    )
    parser.add_argument(
        "--model",
        choices=list_models(),
        default="cotnet50",
        metavar="NAME",
        help="Default %(default)s.",
    )
    arrangements.add_options(parser, batch_size=64, of="all GPUs")
    parser.add_argument("--kinks", action="store_true", help="Keep ReLU and maximum pools.")
    options = parser.parse_args(arguments)
    counts = options.devices or arrangements.default_counts()
    uneven = [str(count) for count in counts if options.batch_size % count]
    if uneven:
        parser.error(f"--batch_size={options.batch_size} is not divided by {', '.join(uneven)}")
    first, worst = None, 0.0
    print(f"{'kernels':8} {'arrangement':28} {'difference':>10} {'second run':>10}", flush=True)
    for implementation in (None, "xla"):
        task = {
            "model": options.model,
            "batch_size": options.batch_size,
            "size": options.size,
            "implementation": implementation,
            "kinks": options.kinks,
        }
        for arrangement in arrangements.each_way(counts):
            try:
                arrays, again = (train(task, arrangement, options.limit) for _ in range(2))
            except ArrangementError as error:
                print(error, flush=True)
                worst = np.inf
                continue
            first = first or arrays
            error = difference(arrays, first)
            same = all(np.array_equal(arrays[name], again[name]) for name in arrays)
            second = "none" if same else f"{difference(again, arrays):.1e}"
            on = "off" if implementation else "on"
            print(f"{on:8} {arrangement!s:28} {error:10.1e} {second:>10}", flush=True)
            worst = max(worst, error)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
