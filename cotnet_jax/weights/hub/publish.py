"""Write weights for the Hugging Face Hub, with a model card, and upload them."""

import json
import os
import pathlib
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from cotnet_jax import files
from cotnet_jax.checkpoint.workdir import Workdir
from cotnet_jax.data import imagenet
from cotnet_jax.data.file_names import as_text, not_a_text
from cotnet_jax.version import __version__
from cotnet_jax.weights.folder import NewFolder, WeightsError, array_digests, differing, versions
from cotnet_jax.weights.hub import card, client, folder
from cotnet_jax.weights.hub.card import Measurement
from cotnet_jax.weights.loading import Weights, read_weights, run_of
from cotnet_jax.weights.torch_files import Kind

Path = str | os.PathLike
# Metrics of a run, without their kind -> as a card calls them.
_METRICS = {"top1": "top-1", "top5": "top-5", "real_top1": "ReaL top-1"}
# Of the versions that a run notes.
_VERSIONS = ("cotnet_jax", "jax", "jaxlib", "flax", "python")
_PLACEHOLDER = "OWNER/NAME"
# Datasets without anything that somebody else could get.
_MADE_UP = ("synthetic", "digits")


def export_for_hub(
    path: Path,
    output: Path,
    *,
    license: str,
    kind: Kind | None = None,
    model: str | None = None,
    measured: Measurement | None = None,
    datasets: Sequence[str] | None = None,
    repository: str | None = None,
    author: str | None = None,
) -> pathlib.Path:
    """Write a folder that ``push_to_hub`` would upload, and that ``load`` takes by its path.

    It holds model.safetensors (PyTorch's names and layouts), cotnet_hub.json (evaluation settings,
    names of the classes, checksums) and README.md, the model card. What is written is read back
    and compared; on an error nothing is left of it.

    Args:
      path: whatever ``load`` takes; of the workdir of a run its best checkpoint.
      output: the folder to create.
      license: of the weights, an identifier of the Hub such as "apache-2.0"; only their owner
        knows it, so there is no default.
      kind, model: as in ``load``.
      measured: the accuracy of these very weights. None takes what a training run has measured at
        this checkpoint; other weights then have a card that says that nothing was measured.
      datasets: identifiers of the Hub, such as "imagenet-1k", of what the weights were trained
        on. None takes the run's, if others can get it.
      repository: OWNER/NAME, for the card; None leaves these words in it.
      author: who measured a run's accuracy; None leaves that to the command in the card.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: the weights cannot be read, ``output`` exists, or a text does not fit in the card.
    """
    license = card.checked(license, "license")
    if datasets is not None:
        datasets = [card.checked(name, "datasets") for name in not_a_text(datasets, "datasets")]
    if not isinstance(measured, Measurement | None):
        raise TypeError(f"measured must be a Measurement, not a {type(measured).__name__}")
    if repository is not None:
        files.parse_hub(f"{files.HUB}{repository}")
    with NewFolder(output, "choose another folder") as new:
        read = read_weights(path, kind, model)
        workdir = run_of(path) if read.source.get("format") == "workdir" else None
        run = _Run(workdir) if workdir else None
        if run and measured is None:
            measured = run.measurement(read, author)
        if datasets is None:
            datasets = run.datasets() if run else []
        names = read.class_names
        settings = folder.HubSettings(
            model=read.model,
            kind=read.kind,
            num_classes=read.num_classes,
            settings=_plain(read.settings),
            attributes=read.attributes,
            class_names=None if names is None else tuple(map(as_text, names)),
            sha256="",
            source=read.source,
        )
        made_by = {"cotnet_jax": __version__, **versions()}
        text = card.render(
            settings,
            title=(repository or new.path.name).rpartition("/")[2],
            address=f"{files.HUB}{repository or _PLACEHOLDER}",
            license=license,
            datasets=datasets,
            parameters=read.parameter_count(),
            measured=measured,
            versions=made_by,
        )
        folder.write(
            new.unfinished,
            read.torch_state_dict(),
            settings,
            card=text,
            more={"versions": made_by},
        )
        written = read_weights(new.unfinished)
        different = differing(array_digests(read.variables), array_digests(written.variables))
        if different:
            raise WeightsError(
                f"{new.path}: the written copy differs in {len(different)} arrays and was removed: "
                f"{', '.join(different[:5])}. Check the disk."
            )
        new.publish()
    return new.path


def push_to_hub(
    path: Path,
    repository: str,
    *,
    license: str,
    kind: Kind | None = None,
    model: str | None = None,
    measured: Measurement | None = None,
    datasets: Sequence[str] | None = None,
    author: str | None = None,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Upload weights to the Hugging Face Hub, with a model card; ``load`` then takes them.

    ``load("hf-hub:OWNER/NAME")`` reads them. Needs the Hub's client, "cotnet_jax[hub]", and a
    login, ``hf auth login``.

    Args:
      path: whatever ``load`` takes.
      repository: OWNER/NAME; created if there is none.
      license, kind, model, measured, datasets: as in ``export_for_hub``.
      author: who measured a run's accuracy; None is OWNER.
      private: of a repository that is created; None leaves it to the owner's settings.
      message: of the commit.

    Returns:
      The address of the repository's page.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: the weights cannot be read, the client is not installed, the upload failed, or a
        text does not fit in the card.
    """
    address = f"{files.HUB}{repository}"
    if files.parse_hub(address)[1] is not None:
        raise ValueError(f"{repository}: give OWNER/NAME without a revision; a commit is added")
    client.import_client(address)
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_for_hub(
            path,
            pathlib.Path(scratch) / "model",
            license=license,
            kind=kind,
            model=model,
            measured=measured,
            datasets=datasets,
            repository=repository,
            author=author or repository.partition("/")[0],
        )
        return client.upload(
            exported,
            repository,
            private=private,
            message=message or f"Upload weights with cotnet_jax {__version__}",
        )


class _Run:
    """What the workdir of a training run says of its accuracy."""

    def __init__(self, workdir: Workdir):
        self._workdir = workdir
        self._data = self._workdir.read_config()["data"]

    def datasets(self) -> list[str]:
        name = self._dataset()
        return [] if os.path.isabs(self._data["name"]) or name in _MADE_UP else [name]

    def measurement(self, read: Weights, author: str | None) -> Measurement | None:
        metrics = {
            shown: float(read.source[f"{read.kind}_{name}"])
            for name, shown in _METRICS.items()
            if f"{read.kind}_{name}" in read.source
        }
        if not metrics:
            return None
        start = self._last_start()
        devices = start.get("devices", {})
        known = start.get("versions", {})
        return Measurement(
            metrics=metrics,
            dataset=self._dataset(),
            split=str(self._data.get("eval_split", "unknown")),
            by=f"{author or 'whoever ran the command'}, the training run itself, at its step "
            f"{read.source['step']}",
            command=_without_folders(start.get("command", [])) or "not noted by the run",
            versions={name: known[name] for name in _VERSIONS if name in known},
            device=f"{devices['count']} x {devices['kind']}" if devices else "",
        )

    def _dataset(self) -> str:
        name = self._data["name"]
        if name.startswith(imagenet.NAME):
            return "imagenet-1k"
        # Not the folders that it lies in, which are its owner's business.
        return pathlib.PurePath(name).name if os.path.isabs(name) else name

    def _last_start(self) -> Mapping[str, Any]:
        try:
            return [{}, *files.read_json_lines(self._workdir.starts)][-1]
        except OSError:
            return {}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON reads them back."""
    return json.loads(json.dumps(dict(settings)))


def _without_folders(command: Sequence[str]) -> str:
    """Return a command whose absolute paths are names: the rest is its owner's business."""

    def shorten(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        value = os.path.basename(value.rstrip("/")) if os.path.isabs(value) else value
        return f"{option}{equals}{value}"

    return shlex.join(map(shorten, command))
