"""Names of parameters, such as "stage1_block0/cot/key_conv/kernel", and patterns over them.

A name is the path of a leaf in the nested dict of parameters. A pattern is a regular expression
that fits a parameter if it is a full match of its name, or of the name of a module around it.
"""

import ast
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax

HEAD = "head"
# An escape, a set of characters, or one other character of a regular expression.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_MULTIPLIER = re.compile(r"\s*(?P<pattern>.+?)\s*=\s*(?P<factor>-?\d+\.?\d*(?:e-?\d+)?)\s*(?:,|$)")
_BLOCK = re.compile(r"stage(\d+)_block(\d+)")
_EXAMPLE = """"head=10,stem.*=0.1" or "{'head': 10, 'stem.*': 0.1}\""""
_MAX_NEAR = 3


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: leaf} of a nested dict of parameters or statistics."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def split(params: Mapping[str, Any], names: Iterable[str]) -> tuple[dict, dict]:
    """Return (all other parameters, those with these names), two nested dicts."""
    flat, chosen = flatten(params), set(names)
    rest = {name: leaf for name, leaf in flat.items() if name not in chosen}
    taken = {name: leaf for name, leaf in flat.items() if name in chosen}
    return _nest(rest), _nest(taken)


def join(params: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return one nested dict of what ``split`` has parted."""
    return _nest(flatten(params) | flatten(others))


def map_named(function: Callable[..., Any], *trees: Any) -> Any:
    """Return a tree of what ``function(name, leaf, ...)`` gives of the leaves with equal names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        *trees,
    )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def fits(pattern: str, name: str) -> bool:
    """Return whether a pattern fits the parameter of this name."""
    return bool(re.fullmatch(f"(?:{pattern})(?:/.*)?", name))


def alternatives(pattern: str) -> list[str]:
    """Return the alternatives of a regular expression, those between "|" outside of groups."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a pattern is not a regular expression."""
    for part in alternatives(pattern):
        try:
            re.compile(part)
        except re.error as error:
            raise ValueError(f"{part!r} is no regular expression: {error}") from None
        if not part:
            raise ValueError(f"{pattern!r} has an empty alternative")


def parse_multipliers(text: str) -> dict[str, float]:
    """Return {pattern: factor} of "head=10,stem.*=0.1" or of a dict as Python writes it.

    Raises:
      ValueError: it is neither, a factor is not above 0, or a pattern is no regular expression.
    """
    multipliers = _parse_dict(text) if text.lstrip().startswith("{") else _parse_list(text)
    for pattern, factor in multipliers.items():
        check_pattern(pattern)
        if not 0 < factor < math.inf:
            raise ValueError(
                f"the factor of {pattern!r} is {factor}; it must be above 0 (to keep parameters as "
                "they are, use --config.finetune.freeze)"
            )
    return multipliers


def _parse_dict(text: str) -> dict[str, float]:
    try:
        return {str(pattern): float(factor) for pattern, factor in ast.literal_eval(text).items()}
    except (ValueError, TypeError, SyntaxError, AttributeError):
        raise ValueError(f"must be like {_EXAMPLE}") from None


def _parse_list(text: str) -> dict[str, float]:
    multipliers: dict[str, float] = {}
    position = 0
    # A pattern may have commas, as in "stage[1,2].*": each ends at its factor.
    while match := _MULTIPLIER.match(text, position):
        multipliers[match["pattern"]] = float(match["factor"])
        position = match.end()
    if position < len(text):
        raise ValueError(f"{text[position:]!r} must be like {_EXAMPLE}")
    return multipliers


def find_unmatched(pattern: str, names: Iterable[str]) -> list[str]:
    """Return a sentence for each alternative of a pattern that fits none of the names."""
    names = list(names)
    return [
        f"{part!r} fits no parameter{_near(part, names)}"
        for part in alternatives(pattern)
        if not any(fits(part, name) for name in names)
    ]


def _near(pattern: str, names: Iterable[str]) -> str:
    """Return a hint at names like a pattern that fits none of them."""
    paths = [name.split("/") for name in names]
    modules = list({"/".join(p[:depth]): 0 for p in paths for depth in range(1, len(p) + 1)})
    plain = re.sub(r"[^\w/]+", "", pattern)
    for wider, found in (
        (f"{plain}.*", [name for name in modules if name.startswith(plain)]),
        (f".*{plain}.*", [name for name in modules if plain in name]),
    ):
        if plain and found:
            level = min(name.count("/") for name in found)
            found = [name for name in found if name.count("/") == level]
            more = ", ..." if len(found) > _MAX_NEAR else ""
            fitting = ", ".join(found[:_MAX_NEAR])
            return f"; it must fit a whole name or module: {wider!r} fits {fitting}{more}"
    near = difflib.get_close_matches(plain, modules, n=_MAX_NEAR, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    layers = [name for name in modules if "/" not in name]
    return f"; their names begin with {', '.join(layers)}"


def depths(names: Iterable[str]) -> dict[str, int]:
    """Return how far from the head each parameter's layer is.

    Layers are the head (0), the bottlenecks, the last one first (1, 2, ...), and the stem.

    Args:
      names: all parameters of a CoTNet.
    """
    place_of = {name: _place(name.split("/")[0]) for name in names}
    # Without a classifier the last block is still one layer before it.
    places = sorted({*place_of.values(), _place(HEAD)}, reverse=True)
    return {name: places.index(place) for name, place in place_of.items()}


def _place(layer: str) -> tuple[int, int]:
    """Return a pair of numbers that grows from the stem to the head."""
    block = _BLOCK.fullmatch(layer)
    if block:
        return int(block[1]), int(block[2])
    return (sys.maxsize, 0) if layer == HEAD else (0, 0)
