"""Find the weights in the contents of a PyTorch file."""

import dataclasses
import itertools
import os
from typing import Any, Literal

import numpy as np

from cotnet_jax.weights.torch_files.budget import LIMITS, Budget, Limits
from cotnet_jax.weights.torch_files.errors import TorchFileError, errors_of
from cotnet_jax.weights.torch_files.inert import InertObject, printable
from cotnet_jax.weights.torch_files.pickle_machine import describe, describe_key
from cotnet_jax.weights.torch_files.reader import TorchFile, read_torch_file
from cotnet_jax.weights.torch_files.tensors import TorchTensor

RAW_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "params")
EMA_KEYS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model",
    "params_ema",
)
# An averager's own state dict has the weights one level deeper.
INNER_KEYS = ("state_dict", "module", "model", "shadow")
# Names that wrappers give to the network inside: DataParallel, torch.compile, FSDP, checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# torch.optim.swa_utils.AveragedModel counts what it has averaged.
AVERAGED = "n_averaged"
_LISTED = 20
# Steps of the budget that an entry of a state dict costs, and one of what may be none.
_ENTRY, _LOOKED_AT = 20, 4
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
# Calls that are not made -> the kind of tensor that PyTorch would make.
_KINDS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_mkldnn_tensor": "a tensor of MKL-DNN",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values, of the meta device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_tensor_v2": "a conjugated or negated tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of a dtype that NumPy lacks",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
    "torch.distributed.tensor.DTensor": "a tensor spread over devices",
    **{f"{module}._reconstruct": "a NumPy array" for module in _MULTIARRAY},
}

# Kinds of weights: their EMA (exponential moving average), or the trained weights themselves.
Kind = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """One state dict of a file.

    Attributes:
      path, format, inert: as in TorchFile.
      state_dict: tensors by name, without the names of wrappers such as ``module.``;
        ``.numpy()`` reads their values.
      prefixes: the names of wrappers that were removed, such as ``module.``.
      unsupported: names of tensors of kinds that are not read -> their kind, such as "a quantised
        tensor".
      kind: "ema" or "raw".
      available: the kinds in the file.
      arch: name of the model, if the file has it.
      epoch, metric: those of a training checkpoint, if the file has them.
      left_out: contents of the file that are not in ``state_dict``, one line each.
      metadata: metadata of a safetensors file.
      unusual_key: the file's entry that is the state dict, where only that shows what it is.
    """

    path: str
    format: str
    inert: tuple[str, ...]
    state_dict: dict[str, TorchTensor]
    kind: Kind
    available: tuple[str, ...]
    arch: str | None
    epoch: int | None
    metric: float | None
    left_out: tuple[str, ...]
    metadata: dict[str, str]
    prefixes: tuple[str, ...] = ()
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    unusual_key: str | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Read the values of all tensors, read-only, mapped from the file if possible.

        Tensors with the same storage, place, shape and dtype, as tied weights are, share an array.

        Raises:
          TorchFileError: some do not match their checksum.
        """
        with errors_of(self.path):
            distinct = {tensor.identity: tensor for tensor in self.state_dict.values()}
            arrays = {identity: tensor.numpy() for identity, tensor in distinct.items()}
            return {name: arrays[tensor.identity] for name, tensor in self.state_dict.items()}


def read_torch_checkpoint(
    path: str | os.PathLike, kind: Kind | None = None, limits: Limits = LIMITS
) -> TorchCheckpoint:
    """Read a whole training checkpoint or a bare state dict, as ``read_torch_file`` does.

    Args:
      path: a .pth.tar, .pth or .safetensors file; for shards their index or its folder.
      kind: which state dict; None chooses the EMA if the file has one, as the published
        accuracies are those of the EMA.
      limits: the work and memory that the file may take, its arrays included.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      TorchFileError: as in ``read_torch_file``; or the file has no state dict of this kind.
    """
    if kind not in (None, "ema", "raw"):
        raise ValueError(f"kind must be 'ema', 'raw' or None, not {kind!r}")
    file = read_torch_file(path, limits)
    with errors_of(file.path):
        return _choose(file, kind)


def _choose(file: TorchFile, kind: Kind | None) -> TorchCheckpoint:
    found = _state_dicts(file.value, file.metadata) or _only_state_dict(file.value, file.budget)
    if not found:
        raise TorchFileError(f"no state dict in it; it holds {_contents(file.value)}")
    kind = kind or ("ema" if "ema" in found else "raw")
    if kind not in found:
        raise TorchFileError(
            f"has no {kind} weights, only {found.popitem()[0]}; omit the kind to use those"
        )
    key, entries = found[kind]
    read = _read_entries(entries, file.budget)
    # Its arrays are charged here: whoever reads them has nothing to watch.
    file.budget.claim_arrays(read.tensors.values())
    top = file.value if key is not None else {}
    beside = [(name, top[name]) for name in top if name != key]
    return TorchCheckpoint(
        path=file.path,
        format=file.format,
        inert=file.inert,
        state_dict=read.tensors,
        kind=kind,
        available=tuple(found),
        arch=_arch(top) or _text(file.metadata.get("model")),
        epoch=top["epoch"] if type(top.get("epoch")) is int else None,
        metric=top["metric"] if type(top.get("metric")) in (int, float) else None,
        left_out=tuple(_list(beside + read.others)),
        metadata=file.metadata,
        prefixes=tuple(f"{wrapper}." for wrapper in read.wrappers),
        unsupported=read.unsupported,
        unusual_key=None if key in RAW_KEYS + EMA_KEYS else key,
    )


def _unsupported_kind(value) -> str | None:
    """Return the kind of tensor that an inert object stands for; None if it is something else."""
    if not isinstance(value, InertObject):
        return None
    if value.name.startswith("safetensors."):
        return f"a tensor of the dtype {value.name.removeprefix('safetensors.')}"
    return _KINDS.get(value.name)


def _is_state_dict(value):
    return type(value) is dict and any(
        type(name) is str and (isinstance(entry, TorchTensor) or _unsupported_kind(entry))
        for name, entry in value.items()
    )


def _state_dict_in(value):
    """Return the state dict that ``value`` is or has, or None."""
    if type(value) is not dict or _is_state_dict(value):
        return value if type(value) is dict else None
    return next((value[key] for key in INNER_KEYS if _is_state_dict(value.get(key))), None)


def _state_dicts(value, metadata) -> dict[Kind, tuple[str | None, dict[Any, Any]]]:
    """Return {"raw" or "ema": (key in the file or None, entries)}."""
    if type(value) is not dict:
        return {}
    found: dict[Kind, tuple[str | None, dict[Any, Any]]] = {}
    by_kind: tuple[tuple[Kind, tuple[str, ...]], ...] = (("raw", RAW_KEYS), ("ema", EMA_KEYS))
    for kind, keys in by_kind:
        for key in keys:
            entries = _state_dict_in(value.get(key))
            if kind not in found and entries:
                found[kind] = (key, entries)
    if not found and _is_state_dict(value):
        # A file that was converted from JAX names their kind.
        averaged = metadata.get("weights") == "ema" or AVERAGED in value
        found["ema" if averaged else "raw"] = (None, value)
    return found


def _only_state_dict(value, budget: Budget) -> dict[Kind, tuple[str | None, dict[Any, Any]]]:
    """Return what ``_state_dicts`` does, of a file with one state dict under some other key.

    Raises:
      TorchFileError: there are several.
    """
    found = {}
    for key, entry in value.items() if type(value) is dict else ():
        if type(key) is not str or type(entry) is not dict:
            continue
        # Many keys can share one dictionary.
        for part in (entry, *map(entry.get, INNER_KEYS)):
            budget.spend(_LOOKED_AT * len(part) if type(part) is dict else 1)
        if entries := _state_dict_in(entry):
            found[key] = entries
    if len(found) > 1:
        raise TorchFileError(
            f"has {len(found)} state dicts, {', '.join(_list(found.items(), ' (', ')'))}: save the "
            "one that is meant alone"
        )
    return {
        "ema" if "ema" in key.lower().split("_") else "raw": (key, entries)
        for key, entries in found.items()
    }


@dataclasses.dataclass
class _Entries:
    """Entries of a state dict: tensors and unsupported ones by short name, and the others."""

    tensors: dict[str, TorchTensor] = dataclasses.field(default_factory=dict)
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    others: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    wrappers: dict[str, None] = dataclasses.field(default_factory=dict)


def _read_entries(entries, budget: Budget) -> _Entries:
    read, twice = _Entries(), []
    for name, entry in entries.items():
        kind = _unsupported_kind(entry)
        if type(name) is not str or not (kind or isinstance(entry, TorchTensor)):
            read.others.append((name, entry))
            continue
        if printable(name) != name:
            # Reports print the names, which can contain anything.
            raise TorchFileError(f"a tensor called '{printable(name)}'")
        budget.spend(_ENTRY + 3 * name.count("."))
        parts = name.split(".")
        # The last part names the tensor itself.
        wrappers = [part for part in parts[:-1] if part in WRAPPERS]
        if wrappers:
            read.wrappers.update(dict.fromkeys(wrappers))
            parts = [part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:]
        short = ".".join(parts)
        if short in read.tensors or short in read.unsupported:
            twice.append(short)
        elif kind:
            read.unsupported[short] = kind
            read.others.append((name, entry))
        else:
            read.tensors[short] = entry
    if twice:
        wrappers = " or ".join(f"'{wrapper}.'" for wrapper in read.wrappers)
        raise TorchFileError(f"names that occur with and without {wrappers}: {_shorten(twice)}")
    return read


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
    return ", ".join(_list(value.items(), " (", ")")) or "nothing"


def _list(entries, before=": ", after=""):
    """Describe the first entries of a dictionary, a line each, and count the others."""
    first = itertools.islice(entries, _LISTED)
    lines = [f"{describe_key(name)}{before}{describe(entry)}{after}" for name, entry in first]
    return lines + ([f"and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else [])


def _shorten(names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
