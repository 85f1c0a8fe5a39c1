"""The folder of a run: its files, and what is written into it at every start."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

from cotnet_jax import files
from cotnet_jax.checkpoint.config_changes import (
    IMAGES,
    Change,
    Difference,
    change_of,
    compare_images,
    find_differences,
)
from cotnet_jax.data import class_names as names_of_classes
from cotnet_jax.data import imagenet
from cotnet_jax.data.file_names import as_text
from cotnet_jax.distributed.first_process import run_on_first

# Longest time that processes wait for the first one's work on a few small files.
_SHARE_SECONDS = 300
# Files that a prepared dataset's folder has at its top.
_DATASET_FILES = ("prepare_report.json", "dataset_info.json")
# Left by processes that were killed; ".writing-*" besides. "*.tmp" are of earlier versions.
_LEFTOVERS = ("*.json.tmp", "*.txt.tmp", ".probe-*")
_PACKAGES = (
    "cotnet_jax",
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
      starts: command, environment and configuration of each start of the run, JSON lines.
      metrics: metrics of each step, JSON lines.
      trackers: ids of the run in Weights & Biases or trackio, JSON.
      tensorboard: folder of TensorBoard's events and of profiles.
      curves: the metrics as a picture, drawn when a run has ended.
      evaluations: folder of the reports, one folder each, and of their metrics.
      checkpoints: folder of the checkpoints, one folder per step.
      lock: held by the run that is at work here.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = files.local(path)
        self.config = self.path / "config.json"
        self.classes = self.path / "classes.txt"
        self.parameters = self.path / "parameters.txt"
        self.starts = self.path / "starts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.trackers = self.path / "trackers.json"
        self.tensorboard = self.path / "tensorboard"
        self.curves = self.path / "curves.png"
        self.evaluations = self.path / "evaluations"
        self.checkpoints = self.path / "checkpoints"
        self.lock = self.path / "run.lock"
        self._held: files.FolderLock | None = None

    def __str__(self) -> str:
        return str(self.path)

    def holds_run(self) -> bool:
        """Return whether a run has written its configuration or checkpoints here."""
        return self.checkpoints.is_dir() or self.config.is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workdir for one run; then clear what killed ones left. Reading needs no lock.

        All processes of a run call it; process 0 holds the lock for all.

        Raises:
          LockedError: another run is at work here (on process 0; FirstProcessError elsewhere).
          OSError: the workdir cannot be written to.
        """
        lock = files.FolderLock(
            self.lock, f"another run is at work in {self}", "choose another --workdir"
        )

        def acquire() -> None:
            with self._explain_failure():
                lock.acquire()
            for folder in (self.path, self.checkpoints, *self.checkpoints.glob("[0-9]*")):
                for path in files.remove_leftovers(folder, *_LEFTOVERS):
                    logging.info("Removed %s, which a killed process left.", path)

        run_on_first(acquire, _SHARE_SECONDS + files.LEASE_SECONDS)
        self._held = lock
        try:
            yield
        finally:
            self._held = None
            lock.release()

    def check_lock(self) -> None:
        """Check that no other run has taken over the workdir; costs nothing.

        Raises:
          LockLostError: one has, because this process stood still for long.
        """
        if self._held:
            self._held.check()

    def read_config(self) -> dict[str, Any]:
        """Return the configuration of the run, parsed from its JSON.

        Raises:
          WorkdirError: it is damaged; names the file and the remedy.
          FileNotFoundError: there is none.
        """
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged_config(str(error)) from None
        if not isinstance(config, dict) or not config:
            raise self.damaged_config(f"it holds {str(config)[:50]!r} in place of the fields")
        return config

    def check_config(self, config: ml_collections.ConfigDict) -> None:
        """Refuse to evaluate here what belongs to another network or to other images.

        Raises:
          WorkdirError: lists the fields that differ, or the run's configuration is damaged.
        """
        differences = self._find_differences(config)
        self._refuse([d for d in differences if change_of(d.field) is Change.IDENTITY])

    def class_names(self, dataset: str) -> tuple[str, ...] | None:
        """Return the names of the run's classes in the order of its logits; None if unknown.

        Args:
          dataset: the run's config.data.name; earlier versions kept no names.

        Raises:
          OSError: they cannot be read.
          WorkdirError: they are no text.
        """
        if self.classes.is_file():
            try:
                return names_of_classes.read_names(self.classes) or None
            except ValueError as error:
                raise WorkdirError(
                    f"{error}; copy it from a copy of the run, or delete it: nothing is compared "
                    "then, and the next start of training writes the names of its own dataset"
                ) from None
        # TFDS names ImageNet's classes by their WordNet ids.
        return names_of_classes.imagenet_names() if dataset.startswith(imagenet.NAME) else None

    def check_resume(
        self,
        config: ml_collections.ConfigDict,
        *,
        has_steps: bool,
        class_names: Sequence[str] | None = None,
        images: int | None = None,
    ) -> None:
        """Refuse settings that the run here cannot be resumed with; log the others that differ.

        Process 0 compares, for all processes; ``config_changes`` has the fields.

        Args:
          has_steps: whether there is a checkpoint. Without one the run starts anew, and may do so
            with any settings.
          class_names: the dataset's, in the order of its labels; None compares none.
          images: number of training images; None compares none.

        Raises:
          WorkdirError: lists the fields that differ and must not; or the dataset's classes are
            others, or in another order; or the run's configuration is damaged; or the folder is
            that of a dataset (on process 0; FirstProcessError elsewhere).
        """

        def check() -> None:
            self._refuse_dataset()
            differences = self._find_differences(config)
            before = self._images_before()
            reported = {difference.field for difference in differences}
            if before is not None and images is not None and IMAGES not in reported:
                differences += compare_images(before, images, json.loads(config.to_json()))
            if has_steps:
                self._refuse(differences)
            for difference in differences:
                free = change_of(difference.field) is Change.FREE
                log = logging.info if free else logging.warning
                log("Changed since the last start: %s.", difference)
            if has_steps and class_names is not None:
                self._check_classes(config, class_names)

        run_on_first(check, _SHARE_SECONDS)

    def _refuse_dataset(self) -> None:
        """Refuse to start a run among the files of a dataset."""
        found = next((name for name in _DATASET_FILES if (self.path / name).is_file()), None)
        if found and not self.holds_run():
            raise WorkdirError(
                f"{self} is the folder of a prepared dataset: {found} is in it. Choose another "
                f"--workdir; to train on the dataset, add --config.data.name={self}"
            )

    def _images_before(self) -> int | None:
        """Return the number of training images of the last start; None if that is unknown."""
        images: Any = None
        with contextlib.suppress(FileNotFoundError), open(self.starts, "rb") as lines:
            for line in lines:
                # Those of earlier versions lack it, and a torn one is none.
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    images = json.loads(line).get("images", images)
        return images if type(images) is int else None

    def _check_classes(self, config, class_names: Sequence[str]) -> None:
        """Refuse a dataset whose labels mean other classes than those that the run has learned."""
        known = self.class_names(config.data.name)
        if known is None:
            return
        learned = names_of_classes.comparable(known)
        labels = names_of_classes.comparable(class_names)
        if learned == labels:
            return
        difference = names_of_classes.describe_difference(
            learned, labels, only_first="only the run has", only_second="only the dataset has"
        )
        if not difference and len(learned) == len(labels):
            label = next(i for i in range(len(labels)) if learned[i] != labels[i])
            difference = (
                f"they have another order: label {label} is {learned[label]!r} in the run, "
                f"{labels[label]!r} in the dataset"
            )
        difference = difference or f"the run has {len(learned)}, the dataset {len(labels)}"
        if config.accept_classes:
            logging.warning("%s: classes differ, as accepted: %s.", self, difference)
            return
        raise WorkdirError(
            f"{self}: the dataset's classes are not those of this run ({self.classes}): "
            f"{difference}. Continue with the dataset that the run began with; or choose another "
            f"--workdir and start it from these weights by --weights={self}; or add "
            "--config.accept_classes=True to go on with the labels as they are."
        )

    def _find_differences(self, config) -> list[Difference]:
        try:
            earlier = self.read_config()
        except FileNotFoundError:
            return []
        return find_differences(earlier, json.loads(config.to_json()))

    def _refuse(self, differences: Sequence[Difference]) -> None:
        refused = [difference for difference in differences if not difference.allowed]
        if refused:
            listed = "\n  ".join(map(str, refused))
            fields = ",".join(difference.field for difference in refused)
            raise WorkdirError(
                f"{self} holds another run:\n  {listed}\n"
                "Choose another --workdir, or that run's settings to continue it; or add "
                f"--config.resume.allow_changes={fields} to go on with these, if you know what "
                "they do to it."
            )

    def damaged_config(self, problem: str) -> WorkdirError:
        """Return the error of a configuration that cannot be used, with the remedy."""
        return WorkdirError(
            f"{self.config}: the configuration of this run is damaged: {problem}. Copy the "
            f'"config" of the last whole line of {self.starts} into it; or delete it, and the '
            "next start of training writes that of its own command, without comparing"
        )

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except (files.LockedError, files.LockLostError):
            raise
        except OSError as error:
            raise OSError(
                f"Could not write to {self}: {error.strerror or error}. Choose another --workdir."
            ) from None

    def write_run_metadata(
        self,
        *,
        config: ml_collections.ConfigDict,
        params: Mapping[str, Any],
        mesh: jax.sharding.Mesh,
        class_names: Sequence[str],
        images: int | None = None,
    ) -> None:
        """Write parameters, devices, mesh, versions and config into the workdir.

        Process 0 writes ``config``, ``parameters`` and ``classes``, and adds a line to ``starts``;
        the others do nothing.

        Args:
          params: nested dict of arrays or ``jax.ShapeDtypeStruct``.
          images: number of training images.

        Raises:
          OSError: the workdir cannot be written to.
        """
        if jax.process_index() != 0:
            return
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        environment = describe_environment(mesh)
        config_text = config.to_json(indent=2)
        start = {**environment, "images": images, "config": json.loads(config.to_json())}
        with self._explain_failure():
            self.path.mkdir(parents=True, exist_ok=True)
            files.append_line(self.starts, json.dumps(start))
            files.write_whole(self.config, config_text + "\n")
            files.write_whole(self.parameters, overview + "\n")
            files.write_whole(self.classes, "\n".join(map(as_text, class_names)) + "\n")


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
