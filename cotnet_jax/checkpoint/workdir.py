"""The folder of a run: its files, and what is written into it at every start."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

from cotnet_jax.data.file_names import as_text

# What a run cannot change: the shapes of the weights, and what they are trained on.
_FIXED_FIELDS = (
    ("model", "name"),
    ("data", "name"),
    ("data", "train_split"),
    ("data", "fake"),
)
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


class Workdir:
    """The folder of one run, and the paths in it; none of them needs to exist yet.

    Attributes:
      path: the folder itself.
      config: the resolved configuration, JSON.
      classes: the class names in the order of the logits, one per line.
      parameters: an overview of the network's parameters, text.
      starts: command and environment of each start of the run, JSON lines.
      metrics: metrics of each step, JSON lines.
      tensorboard: folder of TensorBoard's events and of profiles.
      checkpoints: folder of the checkpoints, one folder per step.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.classes = self.path / "classes.txt"
        self.parameters = self.path / "parameters.txt"
        self.starts = self.path / "starts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    def __str__(self) -> str:
        return str(self.path)

    def holds_run(self) -> bool:
        """Return whether a run has written its configuration or checkpoints here."""
        return self.checkpoints.is_dir() or self.config.is_file()

    def check_config(self, config: ml_collections.ConfigDict) -> None:
        """Refuse a workdir that holds a run of another model or of other data.

        Raises:
          WorkdirError: lists the fields that differ.
        """
        if not self.config.exists():
            return
        earlier = json.loads(self.config.read_text())
        now = json.loads(config.to_json())
        differences = [
            f"--config.{section}.{key}: {there!r} there, {now[section][key]!r} here"
            for section, key in _FIXED_FIELDS
            # A run made before the field existed is assumed to agree.
            if (there := earlier.get(section, {}).get(key, now[section][key])) != now[section][key]
        ]
        if differences:
            raise WorkdirError(
                f"{self} holds another run:\n  " + "\n  ".join(differences) + "\n"
                "Choose another --workdir, or that run's config to continue it."
            )

    def write_run_metadata(
        self,
        *,
        config: ml_collections.ConfigDict,
        params: Mapping[str, Any],
        mesh: jax.sharding.Mesh,
        class_names: Sequence[str],
    ) -> None:
        """Log parameters, devices, mesh, versions and config, and write them into the workdir.

        Process 0 writes ``config``, ``parameters`` and ``classes``, and adds a line to ``starts``;
        the others do nothing.

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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace_text(self.config, config_text)
            _replace_text(self.parameters, overview)
            _replace_text(self.classes, "\n".join(map(as_text, class_names)))
            with self.starts.open("a") as file:
                file.write(json.dumps(environment) + "\n")
        except OSError as error:
            raise OSError(
                f"Could not write to {self}: {error.strerror or error}. Choose another --workdir."
            ) from None


def describe_environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return the command, machine, devices and versions of this process, as JSON values."""
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


def _replace_text(file: Path, text: str) -> None:
    """Write a file by one rename: a reader finds the old content or the new one, never half."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(text + "\n")
    unfinished.replace(file)
