"""Find the weights in the contents of a PyTorch file."""

import dataclasses
import os
from typing import Any, Literal

import numpy as np

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertObject, printable
from cotnet_jax.weights.torch_files.pickle_machine import describe
from cotnet_jax.weights.torch_files.reader import read_torch_file
from cotnet_jax.weights.torch_files.safetensors_format import SafeTensor
from cotnet_jax.weights.torch_files.tensors import TorchTensor

RAW_KEYS = ("state_dict", "model_state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")
PREFIX = "module."
_LISTED = 20

# Kinds of weights: their EMA (exponential moving average), or the trained weights themselves.
Kind = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """One state dict of a file.

    Attributes:
      path, format, inert: as in TorchFile.
      state_dict: tensors by name, without ``module.``; ``.numpy()`` reads their values.
      kind: "ema" or "raw".
      available: the kinds in the file.
      arch: name of the model, if the file has it.
      epoch, metric: those of a training checkpoint, if the file has them.
      left_out: contents of the file that are not in ``state_dict``, one line each.
      metadata: metadata of a safetensors file.
    """

    path: str
    format: str
    inert: tuple[str, ...]
    state_dict: dict[str, TorchTensor | SafeTensor]
    kind: Kind
    available: tuple[str, ...]
    arch: str | None
    epoch: int | None
    metric: float | None
    left_out: tuple[str, ...]
    metadata: dict[str, str]

    def arrays(self) -> dict[str, np.ndarray]:
        """Read the values of all tensors, read-only, mapped from the file if possible.

        Raises:
          TorchFileError: some do not match their checksum.
        """
        try:
            return {name: tensor.numpy() for name, tensor in self.state_dict.items()}
        except TorchFileError as error:
            raise TorchFileError(f"{self.path}: {error}") from None


def read_torch_checkpoint(path: str | os.PathLike, kind: Kind | None = None) -> TorchCheckpoint:
    """Read a whole training checkpoint or a bare state dict, as ``read_torch_file`` does.

    Args:
      path: a .pth.tar, .pth or .safetensors file.
      kind: which state dict; None chooses the EMA if the file has one, as the published
        accuracies are those of the EMA.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      TorchFileError: as in ``read_torch_file``; or the file has no state dict of this kind.
    """
    if kind not in (None, "ema", "raw"):
        raise ValueError(f"kind must be 'ema', 'raw' or None, not {kind!r}")
    file = read_torch_file(path)
    found = _state_dicts(file.value, file.metadata)
    if not found:
        raise TorchFileError(f"{file.path}: no state dict in it; it holds {_contents(file.value)}")
    kind = kind or ("ema" if "ema" in found else "raw")
    if kind not in found:
        raise TorchFileError(
            f"{file.path}: has no {kind} weights, only {found.popitem()[0]}; omit the kind to use "
            "those"
        )
    key, entries = found[kind]
    state_dict, others = _strip(entries, file.path)
    top = file.value if key is not None else {}
    left_out = [f"{printable(str(name))}: {describe(top[name])}" for name in top if name != key]
    return TorchCheckpoint(
        path=file.path,
        format=file.format,
        inert=file.inert,
        state_dict=state_dict,
        kind=kind,
        available=tuple(found),
        arch=_arch(top) or _text(file.metadata.get("model")),
        epoch=top["epoch"] if type(top.get("epoch")) is int else None,
        metric=top["metric"] if type(top.get("metric")) in (int, float) else None,
        left_out=tuple(left_out + others),
        metadata=file.metadata,
    )


def _is_tensor(value):
    return isinstance(value, (TorchTensor, SafeTensor))


def _is_state_dict(value):
    return type(value) is dict and any(
        type(name) is str and _is_tensor(entry) for name, entry in value.items()
    )


def _state_dicts(value, metadata):
    """Return {"raw" or "ema": (key in the file or None, entries)}."""
    if type(value) is not dict:
        return {}
    found: dict[str, tuple[str | None, dict[Any, Any]]] = {}
    for kind, keys in (("raw", RAW_KEYS), ("ema", EMA_KEYS)):
        for key in keys:
            if kind not in found and _is_state_dict(value.get(key)):
                found[kind] = (key, value[key])
    if not found and _is_state_dict(value):
        # A file that was converted from JAX names their kind.
        found["ema" if metadata.get("weights") == "ema" else "raw"] = (None, value)
    return found


def _strip(entries, path):
    """Return (tensors without the prefix, descriptions of what is not a tensor)."""
    tensors, others, twice = {}, [], []
    for name, entry in entries.items():
        if type(name) is not str or not _is_tensor(entry):
            others.append(f"{printable(str(name))}: {describe(entry)}")
            continue
        if printable(name) != name:
            # Reports print the names, which can contain anything.
            raise TorchFileError(f"{path}: a tensor called '{printable(name)}'")
        short = name.removeprefix(PREFIX)
        if short in tensors:
            twice.append(printable(short))
        tensors[short] = entry
    if twice:
        raise TorchFileError(
            f"{path}: names that occur with and without '{PREFIX}': {_shorten(twice)}"
        )
    return tensors, others


def _arch(top):
    """Return the name in ``arch``, a str or a configuration object with ``name``."""
    arch = top.get("arch")
    if isinstance(arch, (dict, InertObject)):
        arch = arch.get("name")
    return _text(arch)


def _text(value):
    return printable(value) if type(value) is str and value else None


def _contents(value):
    if type(value) is not dict:
        what = describe(value)
        if isinstance(value, InertObject):
            what += " (a whole model? save model.state_dict() instead)"
        return what
    return _shorten([f"{printable(str(n))} ({describe(entry)})" for n, entry in value.items()])


def _shorten(names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more
