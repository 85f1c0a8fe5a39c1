"""Finds the weights in what a PyTorch file holds."""

import dataclasses
import os
from typing import Literal

import numpy as np

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertObject, printable
from cotnet_jax.weights.torch_files.pickle_machine import kind
from cotnet_jax.weights.torch_files.reader import read_torch_file
from cotnet_jax.weights.torch_files.safetensors_format import SafeTensor
from cotnet_jax.weights.torch_files.tensors import TorchTensor

RAW_KEYS = ("state_dict", "model_state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")
PREFIX = "module."
_LISTED = 20


# Of weights: EMA, or those that were trained.
Kind = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """One state dict of a file.

    Attributes:
      path, format, inert: as of TorchFile.
      state_dict: tensors by name, without ``module.``; values are read by ``.numpy()``.
      weights: "ema" or "raw", which of the file's state dicts this is.
      available: all that the file has.
      arch: the model's name, if the file gives it.
      epoch, metric: of a training checkpoint, if it gives them.
      left_out: what of the file is not in ``state_dict``, a line each.
      metadata: a safetensors file's own.
    """

    path: str
    format: str
    inert: tuple[str, ...]
    state_dict: dict[str, TorchTensor | SafeTensor]
    weights: Kind
    available: tuple[str, ...]
    arch: str | None
    epoch: int | None
    metric: float | None
    left_out: tuple[str, ...]
    metadata: dict[str, str]

    def arrays(self) -> dict[str, np.ndarray]:
        """The values of all tensors, read-only, mapped from the file where possible.

        Raises:
          TorchFileError: some do not fit their checksum.
        """
        try:
            return {name: tensor.numpy() for name, tensor in self.state_dict.items()}
        except TorchFileError as error:
            raise TorchFileError(f"{self.path}: {error}") from None


def read_torch_checkpoint(path: str | os.PathLike, weights: Kind | None = None) -> TorchCheckpoint:
    """Reads a whole training checkpoint or a bare state dict; see ``read_torch_file``.

    Args:
      path: of a .pth.tar, .pth or .safetensors file.
      weights: which state dict; None takes the EMA weights where the file has them, as the
        published accuracies did.

    Raises:
      FileNotFoundError: no such file.
      TorchFileError: as ``read_torch_file``; no state dict, or not the one asked for.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights must be 'ema', 'raw' or None, not {weights!r}")
    file = read_torch_file(path)
    found = _state_dicts(file.value, file.metadata)
    if not found:
        raise TorchFileError(f"{file.path}: no state dict in it; it holds {_contents(file.value)}")
    chosen = weights or ("ema" if "ema" in found else "raw")
    if chosen not in found:
        raise TorchFileError(
            f"{file.path}: has no {chosen} weights, only {found.popitem()[0]}; leave the choice "
            "out to take those"
        )
    key, entries = found[chosen]
    state_dict, others = _strip(entries, file.path)
    top = file.value if key is not None else {}
    left_out = [f"{printable(str(name))}: {kind(top[name])}" for name in top if name != key]
    return TorchCheckpoint(
        path=file.path,
        format=file.format,
        inert=file.inert,
        state_dict=state_dict,
        weights=chosen,
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
    """{"raw" or "ema": (key in the file or None, entries)}."""
    if type(value) is not dict:
        return {}
    found = {}
    for weights, keys in (("raw", RAW_KEYS), ("ema", EMA_KEYS)):
        for key in keys:
            if weights not in found and _is_state_dict(value.get(key)):
                found[weights] = (key, value[key])
    if not found and _is_state_dict(value):
        # A file that was converted from JAX says which they are.
        found["ema" if metadata.get("weights") == "ema" else "raw"] = (None, value)
    return found


def _strip(entries, path):
    """(tensors without the prefix, descriptions of what is no tensor)."""
    tensors, others, twice = {}, [], []
    for name, entry in entries.items():
        if type(name) is not str or not _is_tensor(entry):
            others.append(f"{printable(str(name))}: {kind(entry)}")
            continue
        if printable(name) != name:
            # Names are printed in reports, and a file may say anything.
            raise TorchFileError(f"{path}: a tensor called '{printable(name)}'")
        short = name.removeprefix(PREFIX)
        if short in tensors:
            twice.append(printable(short))
        tensors[short] = entry
    if twice:
        raise TorchFileError(
            f"{path}: names that are there with and without '{PREFIX}': {_shorten(twice)}"
        )
    return tensors, others


def _arch(top):
    """The name in ``arch``, which is a str or a configuration object with ``name``."""
    arch = top.get("arch")
    if isinstance(arch, (dict, InertObject)):
        arch = arch.get("name")
    return _text(arch)


def _text(value):
    return printable(value) if type(value) is str and value else None


def _contents(value):
    if type(value) is not dict:
        what = kind(value)
        if isinstance(value, InertObject):
            what += " (a whole model? save model.state_dict() instead)"
        return what
    return _shorten([f"{printable(str(name))} ({kind(entry)})" for name, entry in value.items()])


def _shorten(names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more
