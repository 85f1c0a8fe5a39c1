"""The globals of a torch pickle that are interpreted: containers and tensors."""

import numpy as np

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertObject
from cotnet_jax.weights.torch_files.pickle_machine import Constant, Known
from cotnet_jax.weights.torch_files.tensors import (
    DTYPES,
    STORAGE_TYPES,
    TorchTensor,
    make_tensor,
)


def _arguments(args, least, most, what):
    if not least <= len(args) <= most:
        raise TorchFileError(f"{what} with {len(args)} arguments")
    return args + (None,) * (most - len(args))


def _tensor(args, budget):
    source, offset, shape, strides = _arguments(args, 4, 4, "_rebuild_tensor")
    return make_tensor(source, offset, shape, strides, budget)


def _tensor_v2(args, budget):
    source, offset, shape, strides, _, _, metadata = _arguments(args, 6, 7, "_rebuild_tensor_v2")
    if metadata:
        # It marks conjugated and negated views.
        return NotImplemented
    return make_tensor(source, offset, shape, strides, budget)


def _tensor_v3(args, budget):
    source, offset, shape, strides, _, _, dtype, metadata = _arguments(
        args, 7, 8, "_rebuild_tensor_v3"
    )
    if not isinstance(dtype, Constant) or not isinstance(dtype.value, np.dtype) or metadata:
        return NotImplemented
    return make_tensor(source, offset, shape, strides, budget, dtype.value)


def _parameter(args, budget):
    tensor, *_ = _arguments(args, 3, 4, "_rebuild_parameter")
    if isinstance(tensor, InertObject):
        # A parameter of a kind that is not read, such as a sparse one.
        return tensor
    if not isinstance(tensor, TorchTensor):
        raise TorchFileError(f"a parameter of a {type(tensor).__name__}")
    return tensor


def _subclass(args, budget):
    function, _, inner, _ = _arguments(args, 4, 4, "_rebuild_from_type_v2")
    if isinstance(function, Known) and function.build in _TENSOR_BUILDERS and type(inner) is tuple:
        return function.build(inner, budget)
    return NotImplemented


_TENSOR_BUILDERS = (_tensor, _tensor_v2, _tensor_v3, _parameter)


def _ordered_dict(args, budget):
    """Python 2 pickled the entries as an argument, Python 3 sets them afterwards."""
    (pairs,) = _arguments(args, 0, 1, "OrderedDict")
    if pairs is None:
        return {}
    if type(pairs) is not list:
        return NotImplemented
    budget.spend(6 * len(pairs), 100 * len(pairs))
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        return NotImplemented
    if not all(type(pair[0]) is str for pair in pairs):
        return NotImplemented
    return {key: value for key, value in pairs}


def _set(args, budget):
    (values,) = _arguments(args, 0, 1, "set")
    if values is None:
        return set()
    if type(values) is not list:
        return NotImplemented
    budget.spend(len(values), 100 * len(values))
    return set(values) if all(type(value) is str for value in values) else NotImplemented


def _size(args, budget):
    (values,) = _arguments(args, 1, 1, "torch.Size")
    if type(values) not in (tuple, list):
        return NotImplemented
    budget.spend(len(values), 8 * len(values))
    return tuple(values)


def _encode(args, budget):
    """Return bytes, which protocol 2 writes as text of the characters 0 to 255."""
    text, encoding = _arguments(args, 2, 2, "_codecs.encode")
    if type(text) is not str or encoding != "latin1":
        return NotImplemented
    budget.spend(len(text) // 64, len(text))
    return text.encode("latin1")


def _table():
    known = {
        "collections.OrderedDict": _ordered_dict,
        "__builtin__.set": _set,
        "builtins.set": _set,
        "torch.Size": _size,
        "_codecs.encode": _encode,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._tensor._rebuild_from_type_v2": _subclass,
    }
    table: dict[str, Known | Constant] = {name: Known(name, build) for name, build in known.items()}
    constants = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    for storage, dtype in STORAGE_TYPES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            constants[f"{module}.{storage}"] = DTYPES[dtype]
    table.update({name: Constant(name, value) for name, value in constants.items()})
    return table


GLOBALS = _table()
