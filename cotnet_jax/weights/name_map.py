"""Map variables to the published PyTorch models' names and layouts, and back.

By the tables below, every array has exactly one counterpart in PyTorch. Counters of PyTorch, such
as ``num_batches_tracked``, have none here, as they take no part in the computation.
"""

import difflib
import functools
import re
from collections.abc import Mapping

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
# The nearest names are given for so many missing and unexpected tensors: each takes milliseconds.
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
    model = create_model(name, **attributes)
    template = _template(model, channels)
    wanted = {_torch_name(model, path): path for path in template}
    problems = _compare(model, template, wanted, state_dict)
    if problems:
        raise ValueError(
            f"the state dict does not fit {name!r}, {len(problems)} problems:\n  "
            + "\n  ".join(problems)
        )
    variables: dict[str, dict] = {}
    unusable = []
    for torch_name, path in wanted.items():
        tensor = np.asarray(state_dict[torch_name])
        problem = weight_values.find_problem(torch_name, tensor)
        if problem:
            unusable.append(problem)
            continue
        _insert(variables, path, _to_ours(model, path, tensor.astype(np.float32)))
    weight_values.raise_for(unusable)
    return variables


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
    template = _template(model, channels)
    return {_torch_name(model, p): _torch_shape(model, p, s) for p, s in template.items()}


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


def _compare(model, template, wanted, state_dict):
    """Return a line for each tensor that is missing, unexpected or misshapen."""
    given = {n: np.shape(t) for n, t in state_dict.items() if not IGNORED.fullmatch(n)}
    missing = [n for n in wanted if n not in given]
    unexpected = [n for n in given if n not in wanted]

    def near(number, torch_name, names):
        if number >= _NEAREST:
            return ""
        # Comparing all names with all takes half a minute: keep to the same block or leaf.
        stem, _, leaf = torch_name.rpartition(".")
        block = ".".join(torch_name.split(".")[:2])
        names = [n for n in names if n.startswith(block) or n.startswith(stem)][:50] or [
            n for n in names if n.endswith("." + leaf)
        ][:50]
        found = difflib.get_close_matches(torch_name, names, n=1, cutoff=0.7)
        return f" (nearest: {found[0]})" if found else ""

    problems = [f"missing: {n}{near(i, n, unexpected)}" for i, n in enumerate(missing)]
    problems += [
        f"unexpected: {n} {given[n]}{near(i, n, missing or wanted)}"
        for i, n in enumerate(unexpected)
    ]
    for torch_name, path in wanted.items():
        shape = _torch_shape(model, path, template[path])
        if given.get(torch_name, shape) != shape:
            problems.append(f"misshapen: {torch_name} is {given[torch_name]}, should be {shape}")
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


def _torch_shape(model, path, shape):
    return _to_torch(model, path, np.broadcast_to(np.float32(0), shape)).shape


def _exchange(array, axis, groups, inner):
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
        return _exchange(tensor, axis, groups, tensor.shape[axis] // groups // TAPS)
    if module == "weight_conv1" and groups > 1:
        # PyTorch interleaves input and context; here each group has one after the other.
        return _exchange(tensor, 2, 1, tensor.shape[2] // 2)
    return tensor


def _to_torch(model, path, array):
    groups, module, leaf = model.variant.cardinality, path[-2], path[-1]
    if module in ("weight_conv2", "weight_norm"):
        array = _exchange(array, array.ndim - 1, groups, TAPS)
    if module == "weight_conv1" and groups > 1:
        array = _exchange(array, 2, 1, 2)
    if leaf == "kernel":
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return array
