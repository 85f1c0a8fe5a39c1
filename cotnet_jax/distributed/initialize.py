"""Start and exit the processes of a run together.

Each process has its own devices, one process per host or one per GPU. Where there is only one
process, nothing here changes anything.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.experimental import multihost_utils

from cotnet_jax.command_line import first_line
from cotnet_jax.config import out_of_range
from cotnet_jax.distributed import watchdog

# JAX's own service notices a silent process after the watchdog, whose message is clearer.
_HEARTBEAT_GRACE_SECONDS = 10
_OPEN_MPI = "Open MPI"
# Time that a failed process gives the others to report the same failure.
_EXIT_SECONDS = 5


class InitializeError(ValueError):
    """The processes could not be connected; the message says why, and what to type."""


def initialize(
    settings: ml_collections.ConfigDict,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[str] | None = None,
) -> None:
    """Connect this process to the others of its run; call it before anything asks for a device.

    What is not given is taken from the environment of SLURM's srun, Open MPI's mpirun or a TPU
    pod, as JAX detects them. Without such an environment, or with one process, nothing happens.

    On return the first process logs progress; the others log only warnings and errors.

    Args:
      settings: config.distributed.
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes on all hosts.
      process_id: number of this process, from 0.
      local_device_ids: numbers of the GPUs of this host that this process uses. By default all
        of them; one each where srun or mpirun started several processes on the host.

    Raises:
      InitializeError: something is missing or wrong. If not all processes connect within
        settings.slow_timeout_seconds, the process ends with watchdog.EXIT_CODE.
    """
    if num_processes == 1:
        return
    explicit = None not in (coordinator_address, num_processes, process_id)
    environment = {} if explicit else _environment()
    if num_processes is None and process_id is None and coordinator_address is None:
        if environment.get("num_processes", 1) == 1:
            return
        logging.info("Detected the environment of %s.", environment["name"])
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = environment.get("num_processes") if num_processes is None else num_processes
    process_id = environment.get("process_id") if process_id is None else process_id
    _check(settings, environment, coordinator_address, num_processes, process_id, local_device_ids)
    assert num_processes is not None
    local_devices = environment.get("local_devices")
    if local_device_ids:
        local_devices = [int(number) for number in local_device_ids]

    address = coordinator_address or "the address that the environment gives"
    logging.info(
        "Process %d waits up to %d s for all %d processes to connect at %s (to run one process "
        "alone: --num_processes=1).",
        process_id,
        settings.slow_timeout_seconds,
        num_processes,
        address,
    )
    # JAX's service would handle SIGTERM itself, from the very start.
    jax.config.update("jax_enable_preemption_service", False)
    watchdog.handle_aborts()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_devices,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=settings.slow_timeout_seconds,
            heartbeat_timeout_seconds=settings.timeout_seconds + _HEARTBEAT_GRACE_SECONDS,
            shutdown_timeout_seconds=settings.timeout_seconds,
        )
        _check_devices(num_processes)
        # On CPUs all processes must start their first exchange within 30 s of each other. Compiling
        # may set them further apart: exchange something here, where they are together.
        multihost_utils.sync_global_devices("cotnet_jax initialized")
        watchdog.mark_initialized()
    except (RuntimeError, OSError) as error:
        raise InitializeError(
            f"process {process_id} could not connect to the other {num_processes - 1} at "
            f"{address}: {first_line(error)}\n"
            "Start all of them, each with its own --process_id, at an address that is free."
        ) from error
    if process_id:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().setFormatter(_ProcessFormatter())
    logging.info("All %d processes are connected.", num_processes)


@contextlib.contextmanager
def exit_without_waiting() -> Iterator[None]:
    """Let a process that fails exit without waiting for the others; goes around the whole program.

    JAX's own exit waits for them, while they wait for this one's next step. Here the failure is
    printed, the others get a moment to report the same one, and the process ends with the exit
    code that it would have by itself, or with that of a lost peer.

    A single process that exits ends at once, too: JAX's own exit crashes while it still compiles.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            watchdog.exit_if_peer_lost(type(error), error, error.__traceback__)
            watchdog.exit_together(_print_error(error), _EXIT_SECONDS)
        if isinstance(error, SystemExit):
            watchdog.exit_now(_print_error(error))
        raise


def is_first_process() -> bool:
    """Return whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


class _ProcessFormatter(logging.PythonFormatter):
    """Begin each line with the process's number."""

    def format(self, record):
        return f"[process {jax.process_index()}] {super().format(record)}"


def _environment() -> dict[str, Any]:
    """Return the launcher's name, num_processes, process_id, local_devices; {} without one."""
    # JAX has no public function that detects them without initialising at once.
    from jax._src.clusters import ClusterEnv

    found: dict[str, Any] = {}
    try:
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            # JAX 0.10 does not know Open MPI 5, and 0.12 asks for mpi4py to use it.
            found["name"] = _OPEN_MPI
            found["num_processes"] = int(os.environ["OMPI_COMM_WORLD_SIZE"])
            found["process_id"] = int(os.environ["OMPI_COMM_WORLD_RANK"])
            found["local_devices"] = [int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])]
        else:
            present = (c for c in ClusterEnv._cluster_types if _is_present(c))
            cluster = next(present, None)
            if cluster is None:
                return {}
            found["name"] = cluster.name
            found["num_processes"] = cluster.get_process_count()
            found["process_id"] = cluster.get_process_id()
    except (ValueError, KeyError, RuntimeError) as error:
        raise InitializeError(
            f"the environment of {found['name']} cannot be used: {error}"
        ) from error
    if _sees_only_own_devices(found["num_processes"]):
        found["local_devices"] = []
    return found


def _is_present(cluster) -> bool:
    # Kubernetes is left out: its variables are in every pod, one of several or not.
    return cluster.name != "k8s" and not cluster.opt_in_only_method and cluster.is_env_present()


def _sees_only_own_devices(num_processes: int) -> bool:
    """Return whether a process sees only its own GPUs, so that JAX must not choose among them."""
    alone_on_its_host = (
        os.environ.get("SLURM_STEP_NUM_NODES") == str(num_processes)
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return alone_on_its_host or (visible is not None and "," not in visible)


def _check(
    settings, environment, coordinator_address, num_processes, process_id, local_device_ids
) -> None:
    # The other sections are checked once the number of devices is known.
    fields = [f"distributed.{name}" for name in settings]
    problems = list(out_of_range({"distributed": settings}, fields))
    # Open MPI 5 no longer gives the address of its first process.
    address_unknown = environment.get("name") is None or (
        environment["name"] == _OPEN_MPI and "OMPI_MCA_orte_hnp_uri" not in os.environ
    )
    if coordinator_address is None and address_unknown:
        problems.append("--coordinator_address=HOST:PORT of process 0 is missing")
    elif coordinator_address is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator_address):
        problems.append(f"--coordinator_address={coordinator_address}: must be HOST:PORT")
    if num_processes is None:
        problems.append("--num_processes, the number of processes on all hosts, is missing")
    elif num_processes < 1:
        problems.append(f"--num_processes={num_processes}: must be 1 or more")
    if process_id is None:
        problems.append("--process_id, the number of this process from 0, is missing")
    elif process_id < 0 or (num_processes and num_processes > 0 and process_id >= num_processes):
        problems.append(
            f"--process_id={process_id}: must be from 0 to --num_processes - 1"
            + (f" = {num_processes - 1}" if num_processes else "")
        )
    if not all(number.isdigit() for number in local_device_ids or ()):
        problems.append(f"--local_device_ids={','.join(local_device_ids)}: must be like 0 or 0,1")
    if problems:
        raise InitializeError("the processes cannot be connected:\n  " + "\n  ".join(problems))


def _check_devices(num_processes: int) -> None:
    owners = [device.process_index for device in jax.devices()]
    counts = [owners.count(process) for process in range(num_processes)]
    if len(set(counts)) > 1:
        listed = ", ".join(f"process {i} has {count}" for i, count in enumerate(counts))
        raise InitializeError(f"all processes must have equally many devices, but {listed}")


def _print_error(error: BaseException) -> int:
    """Print what Python would print at its exit, and return the exit code."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if isinstance(error.code, int | None):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1
