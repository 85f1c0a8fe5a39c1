"""Measure how the training step grows with the number of GPUs of this host: weak scaling.

    python -m cotnet_jax.tools.benchmark_scaling [--models=cotnet50,...] [--devices=1,2,4,8]

One line for each number of GPUs, in one process and in one process for each GPU: milliseconds of
the recipe's step on noise, images a second, the share of linear (images a second by those that the
same model makes on the first line, times its number of GPUs), and the share of the step in which a
GPU was in an exchange with others (NCCL's kernels; they wait for the slowest, and other kernels
may run beside them). Every GPU has the same batch. With --data a second line is the whole run of
`cotnet-train`, from prepared images, and the share of time that it waited for them. --csv
appends everything to a file. Without GPUs the cores of the CPU are shared, to try the command.
"""

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.command_line import Parser, positive
from cotnet_jax.configs import default
from cotnet_jax.models.cotnet import list_models
from cotnet_jax.tools import arrangements, benchmark_model
from cotnet_jax.tools.arrangements import Arrangement, ArrangementError
from cotnet_jax.tools.benchmark_ops import by_comma
from cotnet_jax.training import loop
from cotnet_jax.training.metric_writer import read_metrics

MODULE = "cotnet_jax.tools.benchmark_scaling"
RATE, WAITED = "images_per_second", "data_wait_share"
# Log lines of a whole run.
LINES = 10
KINDS = {"exchange": "nccl|AllReduce|all-reduce|AllGather|all-gather", "other": ""}


@dataclasses.dataclass
class Line:
    """What was measured of an arrangement; the fields are the columns of the CSV.

    Attributes:
      batch: images of all devices.
      of_linear: share of what the model's first line makes on a device, times the devices.
      exchanging: share of the step; None where it is not known.
    """

    model: str
    devices: int
    processes: int
    batch: int
    dtype: str
    device: str
    jax: str
    ms: float
    images_per_s: float
    of_linear: float
    exchanging: float | None
    gib: float


HEADER = (
    f"{'model':20} {'devices':>7} {'processes':>9} {'batch':>6} {'ms':>8} {'images/s':>9} "
    f"{'of linear':>9} {'exchanging':>10} {'GiB':>6}"
)


def as_text(line: Line) -> str:
    """Return a line of the table."""
    exchanging = "" if line.exchanging is None else f"{line.exchanging:.1%}"
    return (
        f"{line.model:20} {line.devices:7} {line.processes:9} {line.batch:6} {line.ms:8.2f} "
        f"{line.images_per_s:9.0f} {line.of_linear:9.1%} {exchanging:>10} {line.gib:6.1f}"
    )


def measure_here(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the step on all devices of all processes; each calls it."""
    batch = task["batch_size"] * jax.device_count()
    setup = benchmark_model.set_up(task["model"], task["size"], None, batch)
    row = benchmark_model.measure("train", setup, batch, KINDS)
    exchanging = None
    if row.kinds:
        exchanging = row.kinds.get("exchange", 0.0) / jax.local_device_count() / row.ms
    return {
        "batch": batch,
        "dtype": row.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "ms": row.ms,
        "images_per_s": row.images_per_s,
        "exchanging": exchanging,
        "gib": row.gib,
    }


def measure(
    task: dict[str, Any], arrangement: Arrangement, one: float | None, seconds: float
) -> Line:
    """Measure the step of an arrangement.

    Args:
      one: images a second of one device; None if this measurement is to tell.

    Raises:
      ArrangementError: it failed.
    """
    measured = arrangements.run(MODULE, arrangement, task, seconds)
    each = measured["images_per_s"] / arrangement.devices
    return Line(
        model=task["model"],
        devices=arrangement.devices,
        processes=arrangement.processes,
        of_linear=each / (one or each),
        **measured,
    )


def train_here(task: dict[str, Any]) -> dict[str, float]:
    """Train a run of some steps, from prepared images; each process calls it."""
    config = default.get_config()
    config.model.name = task["model"]
    config.data.image_size = task["size"]
    config.data.name, config.data.data_dir = task["data"], task["data_dir"]
    config.batch_size = task["batch_size"] * jax.device_count()
    config.steps, config.log_every_steps = task["steps"], task["steps"] // LINES
    # Longer than so short a run.
    config.schedule.warmup_epochs = 0
    loop.train(config, task["workdir"])
    # The first line holds the start of the images' pipeline.
    lines = list(read_metrics(Workdir(task["workdir"]).metrics).values())[1:]
    return {
        name: statistics.median(line[name] or 0 for line in lines if name in line)
        for name in (RATE, WAITED)
    }


def measure_whole_run(task: dict[str, Any], arrangement: Arrangement, seconds: float) -> str:
    """Return a line about a run of `cotnet-train`, or why there is none."""
    with tempfile.TemporaryDirectory() as workdir:
        try:
            found = arrangements.run(MODULE, arrangement, task | {"workdir": workdir}, seconds)
        except ArrangementError as error:
            return str(error)
    return (
        f"{'':20} the whole run: {found[RATE]:.0f} images/s, "
        f"{found[WAITED]:.1%} of the time waiting for images"
    )


def main(arguments: list[str]) -> None:
    task = arrangements.this_process()
    if task:
        arrangements.pass_on((train_here if "workdir" in task else measure_here)(task))
        return
    command = f"python -m {MODULE}"
    parser = Parser(
        "Measure how the training step grows with the number of GPUs of this host.",
        [
            f"{command} --models=cotnet50,se_cotnetd_152 --csv=scaling.csv",
            f"{command} --devices=1,8 --data=imagenet2012 --data_dir=tensorflow_datasets",
        ],
        notes="The module's docstring says what the columns are.",
    )
    parser.add_argument(
        "--models",
        type=by_comma(list_models()),
        default=["cotnet50"],
        metavar="NAME,...",
        help="Default cotnet50.",
    )
    arrangements.add_options(parser, batch_size=128, of="each GPU")
    parser.add_argument(
        "--data",
        metavar="FOLDER|NAME",
        help="Measure the whole run, too, on a prepared folder or dataset.",
    )
    parser.add_argument(
        "--data_dir", default="", metavar="DIR", help="Folder in which the dataset NAME is."
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=200,
        metavar="N",
        help="Of the whole run; default %(default)s.",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="Append all columns to this file.")
    options = parser.parse_args(arguments)
    if options.steps < 2 * LINES:
        parser.error(f"--steps={options.steps}: must be {2 * LINES} or more")
    counts = options.devices or arrangements.default_counts()
    print(HEADER, flush=True)
    for model in options.models:
        task = {"model": model, "size": options.size, "batch_size": options.batch_size}
        run = {"data": options.data, "data_dir": options.data_dir, "steps": options.steps}
        one = None
        for arrangement in arrangements.each_way(counts):
            try:
                line = measure(task, arrangement, one, options.limit)
            except ArrangementError as error:
                print(error, flush=True)
                continue
            one = one or line.images_per_s / line.devices
            print(as_text(line), flush=True)
            if options.csv:
                benchmark_model.append(options.csv, vars(line))
            if options.data:
                print(measure_whole_run(task | run, arrangement, options.limit), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
