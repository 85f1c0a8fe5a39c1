"""Read the weights of a trained model, from wherever they are: ``read_weights`` is the one door."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from cotnet_jax import command_line, files
from cotnet_jax.checkpoint import weight_values
from cotnet_jax.checkpoint.checkpointer import CheckpointError, open_checkpoints
from cotnet_jax.checkpoint.workdir import Workdir, WorkdirError
from cotnet_jax.config import RANGES, weight_kinds
from cotnet_jax.layers import initializers
from cotnet_jax.models.cotnet import CoTNet, create_model, list_models
from cotnet_jax.models.stages import stage_of
from cotnet_jax.weights import entry_checks, folder, identify, keras_file, keras_name_map
from cotnet_jax.weights.class_order import match_classes
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.hub import client as hub
from cotnet_jax.weights.hub import folder as hub_folder
from cotnet_jax.weights.name_map import (
    IGNORED,
    MisfitError,
    from_torch_state_dict,
    to_torch_state_dict,
    torch_shapes,
)
from cotnet_jax.weights.torch_files import (
    Kind,
    TorchCheckpoint,
    files_of,
    find_index,
    is_unpacked,
    read_torch_checkpoint,
)
from cotnet_jax.weights.torch_files.errors import errors_of
from cotnet_jax.weights.torch_files.inert import printable

# The largest model has 3,600; comparing names takes quadratic time.
_MOST_TENSORS = 10_000
_SETTINGS = ("image_size", "crop", "interpolation", "mean", "std")
_CONFIG_FIELDS: dict[str, entry_checks.Check] = {
    "model.name": entry_checks.MODEL,
    "ema.decay": (
        RANGES["ema.decay"].message,
        lambda value: type(value) in (int, float) and RANGES["ema.decay"].contains(value),
    ),
    "data.name": ("the name or the path of a dataset", lambda value: type(value) is str),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Variables of a model, and what is known about them.

    Attributes:
      model: name of the model, one of ``list_models()``.
      variables: {"params", "batch_stats"}, nested dicts of float32 NumPy arrays.
      kind: "ema" or "raw".
      settings: evaluation settings: image_size in pixels, crop, interpolation, mean, std.
      attributes: keyword arguments of ``create_model`` that the model was trained with.
      class_names: names of the classes in the order of the logits, if known.
      batches: training batches that BatchNorm has seen, PyTorch's ``num_batches_tracked``.
      source: origin of the weights: "file", "format" and, if known, arch, epoch, step, metrics.
      notes: report of what was read, used and left out, one line each.
    """

    model: str
    variables: dict[str, dict]
    kind: Kind
    settings: dict[str, Any]
    attributes: dict[str, Any]
    class_names: tuple[str, ...] | None
    batches: int
    source: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 without a classifier."""
        head = self.variables["params"].get("head")
        return head["kernel"].shape[-1] if head else 0

    @property
    def input_channels(self) -> int:
        """Channels of the images that the first convolution takes."""
        return self.variables["params"]["stem"]["conv1"]["kernel"].shape[-2]

    def parameter_count(self) -> int:
        """Return the number of trained scalars."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    def torch_state_dict(self) -> dict[str, np.ndarray]:
        """Return PyTorch's state dict, with ``batches`` in every ``num_batches_tracked``."""
        tensors = to_torch_state_dict(
            self.model, self.variables, num_classes=self.num_classes, **self.attributes
        )
        return {
            name: np.full_like(tensor, self.batches)
            if name.endswith("num_batches_tracked")
            else tensor
            for name, tensor in tensors.items()
        }


def load(
    path: str | os.PathLike,
    num_classes: int | None = None,
    kind: Kind | None = None,
    model: str | None = None,
    class_names: Sequence[str] | None = None,
    accept_classes: bool = False,
    new_head: bool = False,
    seed: int = 0,
    **attributes,
) -> tuple[CoTNet, dict[str, dict]]:
    """Load a model and its weights.

    Args:
      path: a folder made by cotnet-convert; the workdir of a training run (its best
        checkpoint) or one of its steps, WORKDIR/checkpoints/STEP; a .pth.tar, .pth or
        .safetensors file of PyTorch, the last also in shards (their index or its folder); a .h5
        file of kecam's CoTNets (needs h5py); or ``hf-hub:OWNER/NAME`` or ...``@REVISION``, a
        repository made by ``push_to_hub`` (needs huggingface-hub), or a folder like it.
      num_classes: number of logits. If it is not that of the weights, the classifier is replaced
        by a new one with random weights, for fine-tuning, and a warning is logged. 0 removes the
        classifier: the model returns pooled features.
      kind: "ema" or "raw"; None chooses the EMA (exponential moving average) if there is one.
      model: name of the model, for PyTorch and Keras files that fit several.
      class_names: classes of the dataset that the logits are to be for. Where the weights know as
        many, but in another order, the logits are put into this one. None checks nothing.
      accept_classes: use weights of other classes in the order that they have.
      new_head: replace the classifier even where it has ``num_classes`` logits.
      seed: of the random weights of a new classifier.
      **attributes: other fields of ``CoTNet``: dtype, drop_rate, output_stride, ... With
        ``features_only=True`` the model is a backbone, and what it does not build is left out of
        the variables. If ``in_channels`` is not that of the weights, the first convolution's are
        summed over their channels, for 1 channel, or repeated and scaled by the ratio of channels,
        and a warning is logged.

    Returns:
      (model, variables): a linen module, and {"params", "batch_stats"} for
      ``model.apply(variables, images)``, arrays of the model's ``param_dtype``.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: the weights are damaged, missing, of another kind, for other classes, do not fit
        the model, or hold values that are no usable numbers: see ``checkpoint/weight_values.py``.
    """
    if "weights" in attributes:
        raise TypeError(f"load() takes kind={attributes['weights']!r}, not weights=")
    read = read_weights(path, kind, model)
    variables = read.variables
    backbone = bool(attributes.get("features_only"))
    if backbone:
        num_classes = 0
    elif num_classes is None:
        num_classes = read.num_classes
    net = create_model(read.model, num_classes=num_classes, **read.attributes | attributes)
    if not backbone and (new_head or num_classes != read.num_classes):
        variables = _with_new_head(variables, num_classes, seed)
        logging.warning(
            "%s: its classifier of %d classes is replaced by %s.",
            path,
            read.num_classes,
            f"one of {num_classes} with random weights" if num_classes else "none",
        )
    elif class_names is not None and not backbone:
        variables = match_classes(
            variables, read.class_names, class_names, weights=str(path), accept=accept_classes
        )
    if backbone:
        variables = _of_backbone(variables, net.last_stage)
    if net.in_channels is not None and net.in_channels != read.input_channels:
        variables, how = _with_in_channels(variables, net.in_channels)
        logging.warning(
            "%s: the first convolution's weights, for %d channels, are %s for in_channels=%d.",
            *(path, read.input_channels, how, net.in_channels),
        )
    if net.param_dtype != jnp.float32:
        check_values(variables, path, net.param_dtype)
    return net, jax.tree.map(lambda leaf: jnp.asarray(leaf, net.param_dtype), variables)


def read_weights(
    path: str | os.PathLike, kind: Kind | None = None, model: str | None = None
) -> Weights:
    """Read weights without creating the model; arguments and errors are those of ``load``."""
    if kind not in (None, "ema", "raw"):
        raise ValueError(f"kind must be 'ema', 'raw' or None, not {kind!r}")
    if files.is_hub(path):
        address = files.expand(path)
        return _read_hub(hub.download(address, hub_folder.NEEDED), address, kind, model)
    path = files.local(path)
    run = run_of(path)
    if run is None and not path.exists():
        raise FileNotFoundError(
            f"no file or folder {path}; give a folder made by "
            f"{command_line.command('convert')}, the workdir of a training run or its "
            "checkpoints/STEP, a .pth.tar, .pth, .safetensors or .h5 file, or "
            f"{files.HUB}OWNER/NAME"
        )
    if hub_folder.is_hub_folder(path):
        return _read_hub(path, str(path), kind, model)
    if keras_file.is_hdf5(path):
        return _read_keras(path, kind, model)
    if folder.is_weights_folder(path):
        read = _read_folder(path, kind)
    elif run is not None:
        read = _read_workdir(run.path, kind, None if run.path == path else int(path.name))
    elif path.is_dir() and not is_unpacked(path) and not find_index(path):
        raise WeightsError(
            f"{path}: neither a folder made by {command_line.command('convert')} (it has "
            f"no {folder.DESCRIPTION}), nor the workdir of a training run "
            f"(no {Workdir(path).config.name}), nor a folder for the Hub (no "
            f"{hub_folder.SETTINGS}); a file of weights in it is given by its own path"
        )
    else:
        return _read_torch(path, kind, model)
    if model not in (None, read.model):
        raise WeightsError(
            f"{path}: holds weights of {read.model}, not of {model}; name that model "
            f"(--config.model.name={read.model})"
        )
    check_values(read.variables, path)
    return read


def run_of(path: str | os.PathLike) -> Workdir | None:
    """Return the workdir that ``path`` is, or is WORKDIR/checkpoints/STEP of; else None.

    The checkpoint itself may be missing.
    """
    if files.is_hub(path):
        return None
    path = files.local(path)
    if _is_workdir(path) and not folder.is_weights_folder(path):
        return Workdir(path)
    run = Workdir(path.parent.parent)
    in_checkpoints = path.name.isdecimal() and path.parent == run.checkpoints
    return run if in_checkpoints and run.checkpoints.exists() else None


def read_settings(
    path: str | os.PathLike, kind: Kind | None = None, model: str | None = None
) -> dict[str, Any]:
    """Return what weights say of a configuration: {"model.name", "data.image_size", ...}.

    Args:
      path, kind, model: as of ``load``. Of a converted folder only its description is read.

    Raises:
      FileNotFoundError, ValueError: as ``load``.
    """
    if not files.is_hub(path) and folder.is_weights_folder(files.local(path)):
        description = folder.read_description(files.local(path))
        name, attributes = description["model"], description["attributes"]
        settings = description["settings"]
    else:
        read = read_weights(path, kind, model)
        name, settings, attributes = read.model, read.settings, read.attributes
    return {
        "model.name": name,
        **{f"model.{key}": value for key, value in attributes.items()},
        **{f"data.{key}": value for key, value in settings.items()},
    }


def is_converted_or_trained(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a folder made by ``convert`` or a training run's workdir."""
    path = files.local(path)
    return folder.is_weights_folder(path) or _is_workdir(path)


def check_values(variables: Mapping[str, Any], source: object, dtype: Any = np.float32) -> None:
    """Check that all values are usable numbers, as ``weight_values.check_weights`` does.

    Raises:
      WeightsError: lists all arrays that are not, after ``source``, where they come from.
    """
    try:
        weight_values.check_weights(variables, dtype)
    except weight_values.WeightValuesError as error:
        raise WeightsError(f"{source}: {error}") from None


def _is_workdir(path):
    return path.is_dir() and Workdir(path).holds_run()


def _read_folder(path, wanted):
    description = folder.read_description(path)
    kind = description["weights"]
    if wanted not in (None, kind):
        raise WeightsError(
            f"{path}: has {kind} weights only; convert {description['source'].get('file')} "
            f"again with --kind={wanted}"
        )
    return Weights(
        model=description["model"],
        variables=folder.read_arrays(path),
        kind=kind,
        settings=description["settings"],
        attributes=description["attributes"],
        class_names=tuple(description.get("class_names") or ()) or None,
        batches=description["num_batches_tracked"],
        source=description["source"],
        notes=(f"{path}: {kind} weights of {description['model']}",),
    )


def _read_workdir(path, kind, step: int | None = None):
    """Read one step of a run or, without ``step``, the best one, or the latest if none is rated."""
    workdir = Workdir(path)
    config = _read_config(workdir)
    try:
        kind = kind or weight_kinds(config)[-1]
        with open_checkpoints(workdir, config, read_only=True) as checkpointer:
            if step is not None:
                choice, variables = "chosen", checkpointer.restore_weights(step, kind)
            else:
                choice = "latest" if checkpointer.best_step() is None else "best"
                step, variables = checkpointer.restore_step_and_weights(choice, kind)
            metrics = checkpointer.metrics(step)
    except CheckpointError as error:
        raise WeightsError(f"{path}: {error}") from None
    data, model = config["data"], config["model"]
    return Weights(
        model=model["name"],
        variables=variables,
        kind=kind,
        settings={key: data[key] for key in _SETTINGS},
        attributes={"output_stride": model["output_stride"]},
        class_names=workdir.class_names(data["name"]),
        batches=step,
        source={"file": path.resolve().name, "format": "workdir", "step": step, **metrics},
        notes=(f"{path}: {kind} weights of {model['name']}, {choice} checkpoint, step {step}",),
    )


def _read_config(workdir):
    file = workdir.config
    try:
        config = workdir.read_config()
        problems = list(_config_problems(config))
    except FileNotFoundError:
        raise WeightsError(
            f"{file.parent}: has no {file.name}, which names the model that was trained"
        ) from None
    except WorkdirError as error:
        raise WeightsError(str(error)) from None
    if problems:
        raise WeightsError(str(workdir.damaged_config("; ".join(problems))))
    return config


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each field of a run's configuration that loading needs and cannot use."""
    sections = {name: config.get(name) for name in ("model", "data", "ema")}
    wrong = [name for name, section in sections.items() if not isinstance(section, dict)]
    if wrong:
        yield from (f"{name}: must be a section, with fields" for name in wrong)
        return
    fields = {f"{name}.{key}": value for name in sections for key, value in config[name].items()}
    yield from entry_checks.entry_problems(fields, _CONFIG_FIELDS)
    settings = {key: config["data"].get(key) for key in _SETTINGS}
    yield from entry_checks.settings_problems(settings, "data")
    attributes = {"output_stride": config["model"].get("output_stride")}
    yield from entry_checks.attribute_problems(attributes, "model")


def _read_hub(path, address: str, kind, model) -> Weights:
    """Read a folder of ``hub.folder``, called ``address`` in reports."""
    known = hub_folder.read_settings(path)
    if kind not in (None, known.kind):
        raise WeightsError(f"{address}: has {known.kind} weights only, not {kind}")
    if model not in (None, known.model):
        raise WeightsError(f"{address}: holds weights of {known.model}, not of {model}")
    read = _read_torch(path / hub_folder.TENSORS, None, known.model)
    if (read.kind, read.num_classes) != (known.kind, known.num_classes):
        raise WeightsError(
            f"{address}: {hub_folder.SETTINGS} says {known.kind} weights of {known.num_classes} "
            f"classes, {hub_folder.TENSORS} has {read.kind} weights of {read.num_classes}"
        )
    return dataclasses.replace(
        read,
        settings=known.settings,
        attributes=known.attributes,
        class_names=known.class_names,
        source={"file": address, "format": "hub", "sha256": known.sha256},
        notes=(
            f"{address}: {known.kind} weights of {known.model}, {known.num_classes} classes, "
            "checksum as noted",
        ),
    )


def _read_keras(path, kind, model) -> Weights:
    if kind == "ema":
        raise WeightsError(f"{path}: has no ema weights that are marked so; omit the kind")
    arrays = keras_file.read_keras_file(path)
    shapes = {name: array.shape for name, array in arrays.items()}
    if model is not None:
        create_model(model)
        name, how = model, "as requested"
    elif fits := keras_name_map.matching_models(shapes):
        name, how = fits[0], _how_found(fits)
    else:
        raise WeightsError(
            f"{path}: its {len(shapes)} arrays ({', '.join(map(printable, list(shapes)[:3]))}, "
            "...) are not those of a CoTNet of keras_cv_attention_models; --model=NAME lists what "
            "is missing"
        )
    try:
        variables = keras_name_map.from_keras_weights(name, arrays)
    except MisfitError as error:
        raise WeightsError(f"{path}: does not fit {name!r}, {error}") from None
    except weight_values.WeightValuesError as error:
        raise WeightsError(f"{path}: {error}") from None
    read = Weights(
        model=name,
        variables=variables,
        kind="raw",
        settings=_settings(create_model(name).default_cfg),
        attributes={},
        class_names=None,
        batches=0,
        source={"file": path.name, "format": keras_file.FORMAT},
        notes=(),
    )
    notes = (
        f"read      {path}: {keras_file.FORMAT}, {path.stat().st_size:,} bytes",
        f"weights   {len(shapes)} arrays; the file does not say whether they are an EMA",
        f"model     {name}, {how}; {read.num_classes} classes",
    )
    return dataclasses.replace(read, notes=notes)


def _read_torch(path, kind, model):
    checkpoint, prefix = _without_prefix(read_torch_checkpoint(path, kind))
    shapes = {name: tensor.shape for name, tensor in checkpoint.state_dict.items()}
    if len(shapes) > _MOST_TENSORS:
        raise WeightsError(f"{path}: {len(shapes):,} tensors, more than any CoTNet has")
    name, how = _choose_model(checkpoint, shapes, model)
    _require_supported(checkpoint, name)
    try:
        variables = from_torch_state_dict(name, checkpoint.state_dict)
    except weight_values.WeightValuesError as error:
        raise WeightsError(f"{path}: {error}") from None
    except ValueError as error:
        fits = [other for other in identify.matching_models(shapes) if other != name]
        hint = f"\nIts names and shapes are those of {fits[0]}: --model={fits[0]}" if fits else ""
        if prefix:
            hint += f"\nOnly names that begin with '{prefix}' are the network's, and those of fc"
        raise WeightsError(f"{path}: {error}{hint}") from None
    batches = _batches_tracked(checkpoint)
    read = Weights(
        model=name,
        variables=variables,
        kind=checkpoint.kind,
        settings=_settings(create_model(name).default_cfg),
        attributes={},
        class_names=None,
        batches=batches,
        source={
            "file": path.name,
            "format": checkpoint.format,
            **{
                key: value
                for key in ("arch", "epoch", "metric")
                # JSON has no NaN, which a diverged run's metric may be.
                if (value := getattr(checkpoint, key)) is not None
                and not (isinstance(value, float) and not math.isfinite(value))
            },
        },
        notes=(),
    )
    notes = _torch_notes(path, checkpoint, read, how)
    return dataclasses.replace(read, notes=tuple(notes))


def _without_prefix(checkpoint: TorchCheckpoint) -> tuple[TorchCheckpoint, str]:
    """Return the network alone of a state dict that has more, and what its names began with."""
    try:
        prefix = identify.find_prefix([*checkpoint.state_dict, *checkpoint.unsupported])
    except ValueError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None
    if not prefix:
        return checkpoint, prefix
    inside: dict[str, dict] = {"state_dict": {}, "unsupported": {}}
    outside = []
    for field, entries in inside.items():
        for name, entry in getattr(checkpoint, field).items():
            short = identify.remove_prefix(name, prefix)
            if short is None:
                outside.append(name)
            elif short in inside["state_dict"] or short in entries:
                raise WeightsError(
                    f"{checkpoint.path}: {short} occurs with and without '{prefix}'; save the "
                    "state dict of the network alone"
                )
            else:
                entries[short] = entry
    more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
    left_out = (f"tensors outside of '{prefix}': {', '.join(outside[:5])}{more}",) * bool(outside)
    changed = dataclasses.replace(
        checkpoint,
        state_dict=inside["state_dict"],
        unsupported=inside["unsupported"],
        prefixes=(*checkpoint.prefixes, prefix),
        left_out=(*checkpoint.left_out, *left_out),
    )
    return changed, prefix


def _unsupported(checkpoint, names):
    lines = [f"unsupported: {name} is {checkpoint.unsupported[name]}" for name in names]
    return (
        "\n  ".join(["", *lines[:20], *([f"and {len(lines) - 20} more"] if lines[20:] else [])])
        + "\nConvert them in PyTorch (.dequantize(), .to_dense(), .float()), and save the state "
        "dict again"
    )


def _require_supported(checkpoint, model):
    needed = checkpoint.unsupported and torch_shapes(model).keys() & checkpoint.unsupported.keys()
    if needed:
        raise WeightsError(
            f"{checkpoint.path}: {len(needed)} weights of {model} are of kinds that cannot be read:"
            f"{_unsupported(checkpoint, sorted(needed))}"
        )


def _choose_model(checkpoint: TorchCheckpoint, shapes, model) -> tuple[str, str]:
    """Return the name of the model, and how it was found."""
    if model is not None:
        create_model(model)
        return model, "as requested"
    fits = identify.matching_models(shapes)
    if checkpoint.arch in fits:
        return checkpoint.arch, "named in the file"
    if fits:
        return fits[0], _how_found(fits)
    nearest = identify.nearest_model(shapes)
    if nearest is None:
        more = (checkpoint.unsupported and _unsupported(checkpoint, checkpoint.unsupported)) or ""
        raise WeightsError(
            f"{checkpoint.path}: its {len(shapes)} tensors ({', '.join(list(shapes)[:3])}, ...) "
            f"are not those of a CoTNet; models are {', '.join(list_models())}{more}"
        )
    return nearest, "the nearest by names and shapes"


def _how_found(fits) -> str:
    others = " or ".join(f"--model={other}" for other in fits[1:])
    more = f"; they fit another model too: {others}" if others else ""
    return f"by names and shapes{more}"


def _batches_tracked(checkpoint):
    counts = [
        _count(checkpoint, name)
        for name, tensor in checkpoint.state_dict.items()
        if name.endswith("num_batches_tracked") and tensor.size == 1
    ]
    # One training run counts the same number everywhere.
    return max(counts, default=0)


def _count(checkpoint, name):
    with errors_of(checkpoint.path):
        value = checkpoint.state_dict[name].numpy().item()
    # A count of int64, which averaging can have made a float.
    if isinstance(value, complex) or not 0 <= value < 2**63:
        raise WeightsError(f"{checkpoint.path}: {name} is {value}, not a count of batches")
    return int(value)


def _torch_notes(path, checkpoint, read, how):
    tensors = checkpoint.state_dict
    counters = sum(name.endswith("num_batches_tracked") for name in tensors)
    others = [name for name in tensors if IGNORED.fullmatch(name)]
    statistics = len(jax.tree.leaves(read.variables["batch_stats"]))
    mapped = len(tensors) - len(others)
    files = files_of(path)
    size = sum(file.stat().st_size for file in files)
    shards = f" in {len(files) - 1} shards" if len(files) > 1 else ""
    yield f"read      {path}: {checkpoint.format} format{shards}, {size:,} bytes"
    known = {key: read.source[key] for key in ("arch", "epoch", "metric") if key in read.source}
    if known:
        yield "          " + ", ".join(f"{key} {value}" for key, value in known.items())
    other = {"ema": "raw", "raw": "ema"}[read.kind]
    choice = f"; it has {other} weights too: --kind={other}"
    where = f" of '{printable(checkpoint.unusual_key)}'" if checkpoint.unusual_key else ""
    yield (
        f"weights   {read.kind}, {len(tensors)} tensors{where}"
        f"{choice if other in checkpoint.available else ''}"
    )
    if checkpoint.prefixes:
        yield f"prefixes  {', '.join(checkpoint.prefixes)}: removed from the names"
    yield f"model     {read.model}, {how}; {read.num_classes} classes"
    yield (
        f"mapped    {mapped - statistics} arrays of parameters ({read.parameter_count():,} in all) "
        f"and {statistics} of batch statistics"
    )
    if counters:
        yield f"left out  {counters} num_batches_tracked (the largest, {read.batches}, is kept)"
    if len(others) > counters:
        # Of a profiler, which adds them to every module, and of AveragedModel.
        leaves = sorted({name.rpartition(".")[2] for name in others} - {"num_batches_tracked"})
        yield f"left out  {len(others) - counters} counters: {', '.join(leaves)}"
    if checkpoint.left_out:
        yield "left out  " + ", ".join(checkpoint.left_out)
    if checkpoint.inert:
        more = f" and {len(checkpoint.inert) - 20} more" if len(checkpoint.inert) > 20 else ""
        yield (
            f"not run   {', '.join(checkpoint.inert[:20])}{more}: named in the file, neither "
            "imported nor called"
        )


def _settings(default_cfg):
    sizes = {"image_size": default_cfg["input_size"][0]}
    return sizes | {key: default_cfg[key] for key in _SETTINGS if key in default_cfg}


def _with_new_head(variables: Mapping, num_classes: int, seed: int) -> dict:
    params = dict(variables["params"])
    head = params.pop("head", None)
    if num_classes:
        if head is None:
            raise WeightsError("there is no classifier to replace, so its input width is unknown")
        features = head["kernel"].shape[0]
        uniform = initializers.uniform_fan_in(features)
        kernel_key, bias_key = jax.random.split(jax.random.key(seed))
        params["head"] = {
            "kernel": np.asarray(uniform(kernel_key, (features, num_classes))),
            "bias": np.asarray(uniform(bias_key, (num_classes,))),
        }
    return {**variables, "params": params}


def _of_backbone(variables: Mapping, last_stage: int) -> dict:
    """Return the variables of the stem and of the stages up to one."""
    built = {"stem", *(f"stage{stage}" for stage in range(1, last_stage + 1))}
    return {
        collection: {name: tree for name, tree in modules.items() if stage_of(name) in built}
        for collection, modules in variables.items()
    }


def _with_in_channels(variables: Mapping, channels: int) -> tuple[dict, str]:
    """Return variables for images of another number of channels, and what was done to them.

    An image of equal channels gives the same features as before, with one channel too.
    """
    params = variables["params"]
    kernel = params["stem"]["conv1"]["kernel"]
    given = kernel.shape[2]
    if channels == 1:
        kernel, how = kernel.sum(axis=2, keepdims=True), "summed"
    else:
        kernel = kernel[:, :, np.arange(channels) % given] * np.float32(given / channels)
        how = f"repeated and scaled by {given}/{channels}"
    stem = {**params["stem"], "conv1": {"kernel": kernel}}
    return {**variables, "params": {**params, "stem": stem}}, how
