"""The model card: a README.md for the Hub that says what is known, and by whom it was measured.

https://huggingface.co/docs/hub/model-cards describes the metadata before the text.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from cotnet_jax.weights.hub.folder import CARD, SETTINGS, TENSORS, HubSettings
from cotnet_jax.weights.torch_files.inert import printable

LIBRARY = "cotnet_jax"
TASK = "image-classification"
_TAGS = (TASK, "cotnet", "jax", "flax")
_KINDS = {"ema": "EMA (exponential moving average)", "raw": "raw, as trained"}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """An accuracy that somebody has measured for these very weights.

    Attributes:
      metrics: name -> value, such as {"top-1": 81.3}, in percent.
      dataset: what it was measured on.
      split: the part of the dataset, such as "validation".
      by: who measured it.
      command: what they typed.
      versions: of the packages that they used, by name; {} if unknown.
      device: what it ran on; "" if unknown.
    """

    metrics: Mapping[str, float]
    dataset: str
    split: str
    by: str
    command: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str = ""

    def __post_init__(self):
        for name, value in self.metrics.items():
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"metrics: {name} must be a finite number, not {value!r}")


def render(
    settings: HubSettings,
    *,
    title: str,
    address: str,
    license: str,
    datasets: Sequence[str],
    parameters: int,
    measured: Measurement | None,
    versions: Mapping[str, str],
) -> str:
    """Return the text of a model card, in which {sha256} stands for that of the weights.

    Args:
      settings: of the weights.
      title: name of the repository.
      address: what to give to ``load``.
      license: of the weights, an identifier of the Hub such as "apache-2.0".
      datasets: that they were trained on, identifiers of the Hub.
      parameters: number of trained scalars.
      measured: their accuracy; None says that there is none.
      versions: of the packages that wrote the folder.
    """
    metadata = _metadata(settings.model, title, license, datasets, measured)
    sections = [
        f"# {title}\n\n"
        f"Weights of `{settings.model}`, a CoTNet ([Contextual Transformer Networks, Li et al., "
        f"2021](https://arxiv.org/abs/2107.12292)), for `{LIBRARY}`.",
        _use(address),
        _model(settings, parameters),
        _measured(settings, measured),
        _origin(settings, versions),
    ]
    return f"---\n{metadata}---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(model, title, license, datasets, measured) -> str:
    """Return YAML; every value is written as JSON, which is YAML that needs no quoting rules."""
    lines: dict[str, Any] = {
        "license": license,
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        "tags": [*_TAGS, model],
    }
    if datasets:
        lines["datasets"] = list(datasets)
    if measured:
        lines["metrics"] = ["accuracy"]
        data = {"type": measured.dataset, "name": measured.dataset, "split": measured.split}
        results = [
            {"type": "accuracy", "name": name, "value": value}
            for name, value in measured.metrics.items()
        ]
        result = {"task": {"type": TASK}, "dataset": data, "metrics": results}
        lines["model-index"] = [{"name": title, "results": [result]}]
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())


def _use(address) -> str:
    return f"""## Use

```python
import cotnet_jax

model, variables = cotnet_jax.load("{address}")  # {{"params", "batch_stats"}}
predictor = cotnet_jax.Predictor.load("{address}")  # classifies images
```

```bash
cotnet-predict --weights={address} cat.jpg
```

`pip install "cotnet_jax[hub]"` installs what that needs. `{TENSORS}` has PyTorch's names and
layouts: the original's `model.load_state_dict` takes it, too."""


def _model(settings, parameters) -> str:
    values = settings.settings
    rows = {
        "model": f"`{settings.model}`",
        "weights": _KINDS[settings.kind],
        "parameters": f"{parameters:,}",
        "classes": f"{settings.num_classes:,}{_first_names(settings.class_names)}",
        "images": f"{values['image_size']} x {values['image_size']} pixels, RGB",
        "resized": f"{values['interpolation']}, then the central {values['crop']:g} of the side",
        "normalised": f"mean {_numbers(values['mean'])}, std {_numbers(values['std'])} of 0..1",
    }
    rows |= {name: str(value) for name, value in settings.attributes.items()}
    return "## Model\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows.items()
    )


def _first_names(names) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return ": " + ", ".join(map(_text, names[:5])) + f"{more} (all in `{SETTINGS}`)"


def _measured(settings, measured) -> str:
    if not measured:
        noted = {key: settings.source[key] for key in ("epoch", "metric") if key in settings.source}
        file = (
            "\n\nThe file that they come from notes "
            + ", ".join(f"{key} {value}" for key, value in noted.items())
            + ", not how that was measured; it was not measured again."
            if noted
            else ""
        )
        return (
            "## Accuracy\n\nNot measured. An accuracy that is published for this architecture was "
            f"measured elsewhere, and is not claimed for this file.{file}"
        )
    rows = "\n".join(
        f"| {_text(name)} | {value:.2f} % |" for name, value in measured.metrics.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    facts = {
        "dataset": f"{_text(measured.dataset)}, split `{_text(measured.split)}`",
        "by": _text(measured.by),
        "command": f"`{_text(measured.command)}`",
        "device": _text(measured.device),
        "versions": _text(versions),
    }
    listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)
    return f"## Accuracy\n\n| metric | measured |\n|---|---|\n{rows}\n\n{listed}"


def _origin(settings, versions) -> str:
    source = ", ".join(
        f"{key} {_text(str(value))}"
        for key, value in settings.source.items()
        if key in ("file", "format", "step", "epoch", "arch")
    )
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"""## Origin

- from: {source}
- `{TENSORS}`: SHA-256 `{{sha256}}`
- `{SETTINGS}`: settings, names of classes, checksums
- this `{CARD}` and both files were written by {made}"""


def _numbers(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _text(text: str) -> str:
    """Return a text as one that ends neither its line, nor a table's cell, nor a code span."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text.replace("`", "'").replace("|", "\\|")


def checked(text: str, what: str) -> str:
    """Return a text that the metadata can hold.

    Raises:
      ValueError: it is empty, or has several lines.
    """
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError(f"{what} must be one line of text, not {printable(repr(text))}")
    return text
