"""Several processes as one run: how they find each other, and how they leave.

Each process has its own devices, one process a host or one a GPU. A process that was started
alone stays as it is.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

import jax
import ml_collections
from absl import logging
from jax.experimental import multihost_utils

from cotnet_jax.config import out_of_range
from cotnet_jax.distributed import watchdog

# JAX's own service finds a silent process after the watch of watchdog.py, which tells it better.
_HEARTBEAT_GRACE_SECONDS = 10
_OPEN_MPI = "Open MPI"
# So long a process that failed waits for the others to tell of the same failure.
_LEAVE_SECONDS = 5


class JoinError(ValueError):
    """The processes did not come together; says why, and what to type."""


def join(
    settings: ml_collections.ConfigDict,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[str] | None = None,
) -> None:
    """Makes this process one of several; before anything asks for a device.

    What is not given comes from the environment: that of SLURM's srun, Open MPI's mpirun or a TPU
    pod, as JAX detects them. Where there is none, or one process in all, nothing happens.

    On return the first process logs progress; the others log warnings and errors alone.

    Args:
      settings: config.distributed.
      coordinator_address: HOST:PORT of process 0.
      num_processes, process_id: of all processes, and this one's number, from 0.
      local_device_ids: numbers of this host's GPUs that are this process's. By default all of
        them; but where srun or mpirun started several processes on the host, one for each.

    Raises:
      JoinError: something is missing or wrong. If not all processes come within
        settings.slow_timeout_seconds, the process ends with watchdog.EXIT_CODE.
    """
    if num_processes == 1:
        return
    explicit = None not in (coordinator_address, num_processes, process_id)
    environment = {} if explicit else _environment()
    if num_processes is None and process_id is None and coordinator_address is None:
        if environment.get("num_processes", 1) == 1:
            return
        logging.info("Found the environment of %s.", environment["name"])
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = environment.get("num_processes") if num_processes is None else num_processes
    process_id = environment.get("process_id") if process_id is None else process_id
    _check(settings, environment, coordinator_address, num_processes, process_id, local_device_ids)
    local_devices = environment.get("local_devices")
    if local_device_ids:
        local_devices = [int(number) for number in local_device_ids]

    address = coordinator_address or "the address that the environment gives"
    logging.info(
        "Process %d waits up to %d s until all %d have come to %s (one that is meant to be alone: "
        "--num_processes=1).",
        process_id,
        settings.slow_timeout_seconds,
        num_processes,
        address,
    )
    # It would take SIGTERM for itself, from the very start.
    jax.config.update("jax_enable_preemption_service", False)
    watchdog.translate_aborts()
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
        # On CPUs the first exchange must begin in all processes within 30 s, and compilation may
        # set them further apart: do it here, where they are together.
        multihost_utils.sync_global_devices("cotnet_jax joined")
        watchdog.all_joined()
    except (RuntimeError, OSError) as error:
        raise JoinError(
            f"process {process_id} did not come together with the others of {num_processes} at "
            f"{address}: {watchdog.first_line(error)}\n"
            "Start all of them, each with a --process_id of its own, at an address that is free."
        ) from error
    if process_id:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().setFormatter(_Numbered())
    logging.info("All %d processes are there.", num_processes)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around all that a process does: one that fails must not wait for the others at its exit.

    JAX's own exit waits for them, and they wait for this one's next step. Here the failure is
    told, the others get a moment to tell of the same one, and the process ends with the exit
    code that it would have by itself, or with that of a lost peer.

    A process alone that exits ends at once, too: JAX's own exit crashes while it still compiles.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            watchdog.end_if_lost(type(error), error, error.__traceback__)
            watchdog.exit_together(_tell(error), _LEAVE_SECONDS)
        if isinstance(error, SystemExit):
            watchdog.exit_now(_tell(error))
        raise


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return jax.process_index() == 0


class _Numbered(logging.PythonFormatter):
    """Tells in each line which process says it."""

    def format(self, record):
        return f"[process {jax.process_index()}] {super().format(record)}"


def _environment() -> dict:
    """What the launcher's environment says: name, num_processes, process_id, local_devices."""
    # There is no public way to ask JAX for it without joining at once.
    from jax._src.clusters import ClusterEnv

    found = {}
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
        raise JoinError(f"the environment of {found['name']} is of no use: {error}") from error
    if _all_devices_are_its_own(found["num_processes"]):
        found["local_devices"] = []
    return found


def _is_present(cluster) -> bool:
    # Kubernetes is left out: its variables are in every pod, one of several or not.
    return cluster.name != "k8s" and not cluster.opt_in_only_method and cluster.is_env_present()


def _all_devices_are_its_own(num_processes: int) -> bool:
    """Whether a process sees no GPUs but its own, so that JAX must not choose one of them."""
    alone_on_its_host = (
        os.environ.get("SLURM_STEP_NUM_NODES") == str(num_processes)
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return alone_on_its_host or (visible is not None and "," not in visible)


def _check(
    settings, environment, coordinator_address, num_processes, process_id, local_device_ids
) -> None:
    # The whole configuration is checked when the number of devices is known.
    fields = [f"distributed.{name}" for name in settings]
    problems = list(out_of_range({"distributed": settings}, fields))
    # Open MPI 5 no longer tells where its first process is.
    nobody_tells = environment.get("name") is None or (
        environment["name"] == _OPEN_MPI and "OMPI_MCA_orte_hnp_uri" not in os.environ
    )
    if coordinator_address is None and nobody_tells:
        problems.append("--coordinator_address=HOST:PORT of process 0 is missing")
    elif coordinator_address is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator_address):
        problems.append(f"--coordinator_address={coordinator_address}: must be HOST:PORT")
    if num_processes is None:
        problems.append("--num_processes, of all processes together, is missing")
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
        raise JoinError("the processes cannot come together:\n  " + "\n  ".join(problems))


def _check_devices(num_processes: int) -> None:
    owners = [device.process_index for device in jax.devices()]
    counts = [owners.count(process) for process in range(num_processes)]
    if len(set(counts)) > 1:
        listed = ", ".join(f"process {i} has {count}" for i, count in enumerate(counts))
        raise JoinError(f"all processes must have equally many devices, but {listed}")


def _tell(error: BaseException) -> int:
    """Prints what Python would at its exit; the exit code."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if isinstance(error.code, int | None):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1
