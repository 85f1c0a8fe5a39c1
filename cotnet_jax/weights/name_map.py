"""Map variables to the published PyTorch models' names and layouts, and back.

By the tables below, every array has exactly one counterpart in PyTorch. Counters of PyTorch, such
as ``num_batches_tracked``, have none here, as they take no part in the computation.
``keras_name_map`` has the tables for another implementation, and shares ``assemble``.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cotnet_jax.checkpoint import weight_values
from cotnet_jax.models.cotnet import CoTNet, create_model

SPATIAL = {
    "cot/key_conv": "conv2.key_embed.0",
    "cot/key_bn": "conv2.key_embed.1",
    "cot/weight_conv1": "conv2.embed.0",
    "cot/weight_bn": "conv2.embed.1",
    "cot/weight_conv2": "conv2.embed.3",
    "cot/weight_norm": "conv2.embed.4",
    "cot/value_conv": "conv2.conv1x1.0",
    "cot/value_bn": "conv2.conv1x1.1",
    "cot/bn": "conv2.bn",
    "cot/fusion_conv1": "conv2.se.0",
    "cot/fusion_bn": "conv2.se.1",
    "cot/fusion_conv2": "conv2.se.3",
    "split_attention/conv": "conv2.conv",
    "split_attention/bn0": "conv2.bn0",
    "split_attention/fc1": "conv2.fc1",
    "split_attention/bn1": "conv2.bn1",
    "split_attention/fc2": "conv2.fc2",
}
STEM_7X7 = {"stem/conv1": "conv1", "stem/bn": "bn1"}
STEM_DEEP = {
    "stem/conv1": "conv1.0",
    "stem/bn1": "conv1.1",
    "stem/conv2": "conv1.3",
    "stem/bn2": "conv1.4",
    "stem/conv3": "conv1.6",
    "stem/bn": "bn1",
}
SHORTCUT = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
SHORTCUT_AVERAGED = {"downsample_conv": "downsample.1", "downsample_bn": "downsample.2"}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Positions ("taps") of the 3x3 neighbourhood that is aggregated.
TAPS = 9
# The block that a name is of, or else its first part.
_BLOCK = re.compile(r"(layer\d+\.\d+\.|stack\d+_block\d+_|[^./]*).*", re.DOTALL)
# The nearest names are given for so many missing and unexpected arrays: each takes milliseconds.
_NEAREST = 50
# Counters that take no part in the computation: BatchNorm's, of the profiler thop, and of
# AveragedModel.
IGNORED = re.compile(r"(.*\.)?(num_batches_tracked|total_ops|total_params)|n_averaged")


def from_torch_state_dict(
    name: str, state_dict: Mapping[str, ArrayLike], **attributes
) -> dict[str, dict]:
    """Convert a PyTorch state dict to the variables of ``create_model(name)``.

    Args:
      name: one of ``list_models()``.
      state_dict: torch name -> array, in PyTorch's layout and any floating dtype; the values are
        cast to float32. The numbers of classes and of input channels are those of the arrays.
      **attributes: other fields of ``CoTNet`` that change the parameters.

    Returns:
      {"params", "batch_stats"}, nested dicts of float32 arrays.

    Raises:
      ValueError: lists every missing, unexpected and misshapen tensor, the first with the nearest
        names.
      WeightValuesError: lists, by their torch names, all tensors that are not floating or not
        finite in float32, and running variances that are negative.
    """
    # Tensors of other shapes say nothing of the model; they are reported as misshapen.
    classifier = np.shape(state_dict.get("fc.weight", ()))
    if len(classifier) == 2 and all(classifier) and "num_classes" not in attributes:
        attributes["num_classes"] = int(classifier[0])
    stem = next((n for n in ("conv1.0.weight", "conv1.weight") if n in state_dict), None)
    filters = np.shape(state_dict[stem]) if stem else ()
    channels = filters[1] if len(filters) == 4 and all(filters) else 3
    given = {n: tensor for n, tensor in state_dict.items() if not IGNORED.fullmatch(n)}
    try:
        return assemble(create_model(name, **attributes), channels, given, _TORCH)
    except MisfitError as error:
        raise ValueError(f"the state dict does not fit {name!r}, {error}") from None


def to_torch_state_dict(name: str, variables: Mapping, **attributes) -> dict[str, np.ndarray]:
    """Convert variables of ``create_model(name)`` to a PyTorch state dict.

    The inverse of ``from_torch_state_dict``.

    Returns:
      torch name -> contiguous array in PyTorch's layout, of the same dtype, with a zero
      ``num_batches_tracked``, int64 [], for each batch norm.
    """
    model = create_model(name, **attributes)
    state_dict = {}
    for path, value in _flatten(variables):
        torch_name = _torch_name(model, path)
        state_dict[torch_name] = np.ascontiguousarray(_to_torch(model, path, np.asarray(value)))
        if path[-1] == "var":
            module = torch_name.removesuffix("running_var")
            state_dict[module + "num_batches_tracked"] = np.zeros((), np.int64)
    return state_dict


def torch_shapes(name: str, channels: int = 3, **attributes) -> dict[str, tuple[int, ...]]:
    """Return torch name -> shape for a model's state dict, without ``num_batches_tracked``."""
    model = create_model(name, **attributes)
    return _TORCH.shapes(model, channels)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and layouts that another implementation gives to the variables of a model.

    Attributes:
      name: (model, path of a variable) -> its name there.
      to_ours: (model, path, array from there) -> the variable.
      to_theirs: (model, path, variable) -> the array there; the inverse.
    """

    name: Callable[[CoTNet, tuple[str, ...]], str]
    to_ours: Callable[[CoTNet, tuple[str, ...], np.ndarray], np.ndarray]
    to_theirs: Callable[[CoTNet, tuple[str, ...], np.ndarray], np.ndarray]

    def shapes(self, model: CoTNet, channels: int) -> dict[str, tuple[int, ...]]:
        """Return name -> shape there, of every variable of a model for so many input channels."""
        return {
            self.name(model, path): self.to_theirs(
                model, path, np.broadcast_to(np.float32(0), shape)
            ).shape
            for path, shape in _template(model, channels).items()
        }


class MisfitError(ValueError):
    """Arrays are not those of a model; the message lists all problems."""


def assemble(
    model: CoTNet, channels: int, given: Mapping[str, ArrayLike], layout: Layout
) -> dict[str, dict]:
    """Return {"params", "batch_stats"}, float32, of arrays with another implementation's names.

    Args:
      model: its number of classes counts, too.
      channels: of the images.
      given: name -> array of any floating dtype.
      layout: of the names and the arrays.

    Raises:
      MisfitError: lists every missing, unexpected and misshapen array, with the nearest names.
      WeightValuesError: lists all arrays that are not floating or not finite in float32, and
        running variances that are negative.
    """
    problems = _compare(layout.shapes(model, channels), given)
    if problems:
        raise MisfitError(f"{len(problems)} problems:\n  " + "\n  ".join(problems))
    variables: dict[str, dict] = {}
    unusable = []
    for path in _template(model, channels):
        name = layout.name(model, path)
        array = np.asarray(given[name])
        problem = weight_values.find_problem(name, array)
        if problem:
            unusable.append(problem)
            continue
        _insert(variables, path, layout.to_ours(model, path, array.astype(np.float32)))
    weight_values.raise_for(unusable)
    return variables


@functools.cache
def _template(model, channels):
    """Return path -> shape of every variable; tracing a large network takes a second."""
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in _flatten(variables)}


def _flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


def _insert(tree, path, value):
    functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], tree)[path[-1]] = value


def _compare(wanted, arrays):
    """Return a line for each array that is missing, unexpected or misshapen."""
    given = {name: np.shape(array) for name, array in arrays.items()}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]

    def near(number, name, names):
        if number >= _NEAREST:
            return ""
        # Comparing all names with all takes half a minute: keep to the same block or leaf.
        end = max(name.rfind("."), name.rfind("/"))
        stem, leaf = name[: max(end, 0)], name[end + 1 :]
        block = _BLOCK.sub(r"\1", name)
        names = [n for n in names if n.startswith(block) or n.startswith(stem)][:50] or [
            n for n in names if n.endswith(leaf)
        ][:50]
        found = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        return f" (nearest: {found[0]})" if found else ""

    problems = [f"missing: {n}{near(i, n, unexpected)}" for i, n in enumerate(missing)]
    problems += [
        f"unexpected: {n} {given[n]}{near(i, n, missing or wanted)}"
        for i, n in enumerate(unexpected)
    ]
    for name, shape in wanted.items():
        if given.get(name, shape) != shape:
            problems.append(f"misshapen: {name} is {given[name]}, should be {shape}")
    return problems


def _torch_name(model: CoTNet, path):
    """("params", "stem", "conv1", "kernel") -> "conv1.weight"."""
    _, *modules, leaf = path
    variant = model.variant
    block = re.fullmatch(r"stage(\d)_block(\d+)", modules[0])
    if block:
        inside = "/".join(modules[1:])
        shortcut = SHORTCUT_AVERAGED if variant.average_down else SHORTCUT
        inside = (SPATIAL | shortcut).get(inside, inside)
        module = f"layer{block[1]}.{block[2]}.{inside}"
    else:
        stem = STEM_DEEP if variant.stem_width else STEM_7X7
        module = (stem | {"head": "fc"})["/".join(modules)]
    return f"{module}.{LEAVES[leaf]}"


def exchange(array, axis, groups, inner):
    """Reshape an axis to [groups, inner, rest], and swap inner and rest."""
    shape = array.shape
    split = array.reshape(*shape[:axis], groups, inner, -1, *shape[axis + 1 :])
    return np.swapaxes(split, axis + 1, axis + 2).reshape(shape)


def _to_ours(model, path, tensor):
    groups, module, leaf = model.variant.cardinality, path[-2], path[-1]
    if leaf == "kernel":
        tensor = tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)
    axis = tensor.ndim - 1
    if module in ("weight_conv2", "weight_norm"):
        # In PyTorch the taps vary fastest, here the weight channels.
        return exchange(tensor, axis, groups, tensor.shape[axis] // groups // TAPS)
    if module == "weight_conv1" and groups > 1:
        # PyTorch interleaves input and context; here each group has one after the other.
        return exchange(tensor, 2, 1, tensor.shape[2] // 2)
    return tensor


def _to_torch(model, path, array):
    groups, module, leaf = model.variant.cardinality, path[-2], path[-1]
    if module in ("weight_conv2", "weight_norm"):
        array = exchange(array, array.ndim - 1, groups, TAPS)
    if module == "weight_conv1" and groups > 1:
        array = exchange(array, 2, 1, 2)
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return array


_TORCH = Layout(_torch_name, _to_ours, _to_torch)
