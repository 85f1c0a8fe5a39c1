"""What a run starts with, told in the log and kept in its workdir."""

import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

CONFIG = "config.json"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "array-record",
    "numpy",
    "pillow",
    "simplejpeg",
)


class WorkdirError(ValueError):
    """The workdir holds a run that this configuration cannot continue."""


def check_workdir(workdir: str | Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a workdir that holds a run of another model or of other data.

    Raises:
      WorkdirError: lists the fields that differ.
    """
    file = Path(workdir) / CONFIG
    if not file.exists():
        return
    earlier = json.loads(file.read_text())
    now = json.loads(config.to_json())
    # These decide the shapes of the weights and what they are trained on.
    fixed = {"model": ("name",), "data": ("name", "train_split", "fake")}
    differences = [
        f"--config.{section}.{key}: {there!r} there, {now[section][key]!r} here"
        for section, keys in fixed.items()
        for key in keys
        # A run from before there was the field is taken to agree.
        if (there := earlier.get(section, {}).get(key, now[section][key])) != now[section][key]
    ]
    if differences:
        raise WorkdirError(
            f"{workdir} holds another run:\n  " + "\n  ".join(differences) + "\n"
            "Choose another --workdir, or that run's config to continue it."
        )


def write_run_metadata(
    workdir: str | Path,
    *,
    config: ml_collections.ConfigDict,
    params: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    class_names: Sequence[str],
) -> None:
    """Logs parameters, devices, mesh, versions and config, and writes them into ``workdir``.

    Files, by process 0: config.json, the resolved config; parameters.txt, the overview of
    ``params``; classes.txt, a class name a line; starts.jsonl, a line for each start of the run
    with its command and environment.

    Args:
      params: nested dict of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      OSError: the workdir cannot be written to.
    """
    if jax.process_index() != 0:
        return
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    environment = describe_environment(mesh)
    config_text = config.to_json(indent=2)
    logging.info("Parameters:\n%s", overview)
    logging.info("Config:\n%s", config_text)
    for name in ("devices", "mesh", "versions"):
        logging.info("%s: %s", name.capitalize(), _one_line(environment[name]))
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files = {
            CONFIG: config_text,
            "parameters.txt": overview,
            "classes.txt": "\n".join(class_names),
        }
        for name, text in files.items():
            unfinished = workdir / f"{name}.tmp"
            unfinished.write_text(text + "\n")
            unfinished.replace(workdir / name)
        with (workdir / "starts.jsonl").open("a") as file:
            file.write(json.dumps(environment) + "\n")
    except OSError as error:
        raise OSError(
            f"Could not write to {workdir}: {error.strerror or error}. Choose another --workdir."
        ) from None


def describe_environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The command, machine, devices and versions of this process, as JSON values."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "machine": platform.platform(),
        "devices": {
            "count": jax.device_count(),
            "kind": ", ".join(kinds),
            "platform": jax.default_backend(),
            "processes": jax.process_count(),
        },
        "mesh": {str(name): size for name, size in mesh.shape.items()},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _one_line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
