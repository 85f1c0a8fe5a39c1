"""Inert objects: stand-ins for the classes and functions that a pickle names, never run."""

from typing import Any

_LONGEST_NAME = 120


def printable(text: str) -> str:
    """Return ``text`` without control characters and shortened, fit for a terminal."""
    # Only the beginning is looked at: a file can repeat one long text many times.
    text = text[: _LONGEST_NAME + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."


class InertGlobal:
    """A class or function that a pickle named. It was not imported and cannot be called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = printable(name)

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


class InertObject:
    """A call in a pickle that was not made, in place of its result.

    Attributes:
      name: name of the innermost class or function.
      source: the callable, an InertGlobal or another InertObject.
      args: the positional arguments, usually a tuple.
      kwargs: the keyword arguments, if any.
      states: arguments of ``__setstate__``, in order.
      items: entries that would be set, as on a dictionary.
      elements: elements that would be appended, as to a list or set.
    """

    __slots__ = ("args", "elements", "items", "kwargs", "name", "source", "states")

    def __init__(self, source: "InertGlobal | InertObject", args, kwargs=None):
        # Chains of calls can be long: the name is handed on, not looked for.
        self.name: str = source.name
        self.source = source
        self.args = args
        self.kwargs = kwargs
        self.states: list[Any] = []
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def get(self, key: str, default=None):
        """Return the entry or attribute ``key``, if the pickle has one."""
        for mapping in (self.items, *reversed(self.states)):
            if isinstance(mapping, dict) and key in mapping:
                return mapping[key]
        return default

    def __repr__(self) -> str:
        return f"<inert object of {self.name}>"
