"""Metrics to Weights & Biases and trackio, for those who have them installed."""

import contextlib
import importlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import ml_collections
from absl import logging

from cotnet_jax import files
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.config import names_in


class TrackerError(ValueError):
    """A tracker cannot be used; the message says what to type."""


def import_trackers(writers: str) -> dict[str, ModuleType]:
    """Import what config.log.writers names.

    Raises:
      TrackerError: lists all that are not installed.
    """
    modules, missing = {}, []
    for name in names_in(writers):
        try:
            modules[name] = importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise TrackerError(
            f"--config.log.writers={writers}: not installed: {', '.join(missing)}; type "
            f"pip install {' '.join(missing)}, or leave the option out"
        )
    return modules


class Tracker:
    """One run of Weights & Biases or trackio, which a resumed run continues.

    Failures to write are logged once and end the tracking, not the run: metrics.jsonl has it all.

    Args:
      module: wandb or trackio.
      workdir: its file trackers.json keeps the run's id.
      config: the run's configuration.
    """

    def __init__(self, module: ModuleType, workdir: Workdir, config: ml_collections.ConfigDict):
        self._module: Any = module
        self._open = True
        name = module.__name__
        identity = _run_id(workdir, name)
        settings = {
            "project": config.log.project,
            "config": json.loads(config.to_json()),
            "resume": "allow",
        }
        if name == "wandb":
            settings |= {"id": identity, "name": workdir.path.name, "dir": str(workdir)}
        else:
            # trackio knows its runs by their names.
            settings["name"] = f"{workdir.path.name}-{identity}"
        try:
            self._run = self._module.init(**settings)
        except Exception as error:
            raise TrackerError(
                f"--config.log.writers={name}: {name} cannot start: {error}"
            ) from None
        if name == "wandb":
            # A run that was killed repeats steps, which wandb's own counter refuses.
            self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        if self._module.__name__ == "wandb":
            self._do("log", {**values, "step": step})
        else:
            self._do("log", values, step=step)

    def close(self) -> None:
        self._do("finish")
        self._open = False

    def _do(self, function: str, *args: Any, **kwargs: Any) -> None:
        if not self._open:
            return
        try:
            getattr(self._module, function)(*args, **kwargs)
        except Exception as error:
            self._open = False
            logging.warning("%s is no longer written to: %s", self._module.__name__, error)


@contextlib.contextmanager
def open_trackers(
    workdir: Workdir, config: ml_collections.ConfigDict
) -> Iterator[Sequence[Tracker]]:
    """Yield the trackers of config.log.writers, and finish them; only process 0 has any."""
    trackers: list[Tracker] = []
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            for module in import_trackers(config.log.writers).values():
                trackers.append(Tracker(module, workdir, config))
                stack.callback(trackers[-1].close)
        yield trackers


def _run_id(workdir: Workdir, name: str) -> str:
    """Return the id of the run, the same at every start in this workdir."""
    file = workdir.trackers
    ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        files.write_whole(file, json.dumps(ids) + "\n")
    return ids[name]
