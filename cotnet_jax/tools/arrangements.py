"""The same computation by other arrangements of devices and processes, each in new processes.

A process keeps the devices that it has found. So a tool that compares arrangements starts its own
module again for each: ``run`` does, and ``this_process`` is what such a process calls first.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cotnet_jax.command_line import Parser, positive, positives
from cotnet_jax.configs import default
from cotnet_jax.distributed import initialize

# What a process is told, as JSON; not to be set by hand.
_VARIABLE = "COTNET_JAX_ARRANGEMENT"
_SECONDS_BETWEEN_LOOKS = 0.2
# Of a failed process's last lines, so many are shown.
_LINES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Devices of this host, and the processes that share them equally."""

    devices: int
    processes: int

    def __str__(self) -> str:
        each = "one process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.devices} device{'s' * (self.devices != 1)}, {each}"


class ArrangementError(RuntimeError):
    """A process of an arrangement failed, or was not done in time; the message has what it said."""


def each_way(counts: Sequence[int]) -> Iterator[Arrangement]:
    """Yield each number of devices in one process, then in one process for each."""
    for count in counts:
        yield Arrangement(count, 1)
        if count > 1:
            yield Arrangement(count, count)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``most``."""
    return [2**i for i in range(most.bit_length())]


def default_counts() -> list[int]:
    """Return 1, 2, 4, ... up to the number of devices here."""
    return powers_of_two(count_devices())


def add_options(parser: Parser, *, batch_size: int, of: str) -> None:
    """Add --devices, without which ``default_counts`` are meant, --limit, --batch_size and --size.

    Args:
      batch_size: the default, of the GPUs that ``of`` names.
    """
    parser.add_argument(
        "--devices",
        type=positives,
        metavar="N,...",
        help="Numbers of GPUs; default 1, 2, 4, ... up to all of them.",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=1800,
        metavar="SECONDS",
        help="Longest time of one measurement; default %(default)s.",
    )
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=batch_size,
        metavar="N",
        help=f"Images of {of}; default %(default)s.",
    )
    parser.add_argument(
        "--size", type=positive, default=224, metavar="N", help="Pixels; default %(default)s."
    )


def count_devices() -> int:
    """Return how many devices JAX finds here, without taking them for this process."""
    script = "import jax; print(jax.local_device_count())"
    result = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    return int(result.stdout.splitlines()[-1])


def run(module: str, arrangement: Arrangement, task: dict[str, Any], seconds: float) -> Any:
    """Run ``python -m module`` as ``arrangement``; return what its first process passes on.

    Args:
      module: one whose main program asks ``this_process`` for its task.
      task: what JSON can hold.
      seconds: longest time until all processes have ended.

    Raises:
      ArrangementError: a process failed or was too slow; all are killed.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        outputs, processes = [], []
        for number in range(arrangement.processes):
            # Into files: a pipe that nobody reads would stop a process.
            outputs.append(stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")))
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=os.environ | _environment(arrangement, number, address, task),
                stdout=outputs[-1],
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        why = _wait(processes, time.monotonic() + seconds)
        said = []
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            process.wait()
            output.seek(0)
            said.append(output.read().splitlines())
    if why:
        number, reason = why
        last = "".join(f"\n  {line}" for line in said[number][-_LINES_SHOWN:])
        raise ArrangementError(f"{arrangement}: process {number} {reason}{last}")
    return json.loads(said[0][-1])


def this_process() -> dict[str, Any] | None:
    """Return the task of a process that ``run`` started, connected to the others; or else None.

    Call it before anything asks for a device.
    """
    text = os.environ.get(_VARIABLE)
    if text is None:
        return None
    told = json.loads(text)
    if told["processes"] > 1:
        initialize.initialize(
            default.get_config().distributed,
            coordinator_address=told["address"],
            num_processes=told["processes"],
            process_id=told["number"],
        )
    return told["task"]


def pass_on(result: Any) -> None:
    """Print a process's result, for ``run`` to return; the first process's counts."""
    print(json.dumps(result), flush=True)


def _environment(arrangement, number, address, task) -> dict[str, str]:
    each = arrangement.devices // arrangement.processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(arrangement.devices)]
    told = {"processes": arrangement.processes, "number": number, "address": address, "task": task}
    return {
        _VARIABLE: json.dumps(told),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus[number * each : (number + 1) * each]),
        # Without GPUs the CPU's cores are shared by so many devices.
        "JAX_NUM_CPU_DEVICES": str(each),
    }


def _wait(processes, end) -> tuple[int, str] | None:
    """Wait for all; return which one failed and how. One that fails leaves the others waiting."""
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                return number, f"ended with {code}"
        if None not in codes:
            return None
        if time.monotonic() > end:
            return codes.index(None), "was not done in time"
        time.sleep(_SECONDS_BETWEEN_LOOKS)
