"""Stand-ins for the classes and functions that a pickle names: data, never run."""

_LONGEST_NAME = 120


def printable(text: str) -> str:
    """``text`` without control characters and shortened, fit for a terminal."""
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
    """What a pickle wanted to make by calling something; holds the call, which was not made.

    Attributes:
      source: what was to be called, an InertGlobal or another InertObject.
      args: the positional arguments, usually a tuple.
      kwargs: the keyword arguments, if any.
      states: what was to be set on the object, in order.
      items: entries that were to be set, as of a dictionary.
      elements: elements that were to be appended, as of a list or set.
    """

    __slots__ = ("args", "elements", "items", "kwargs", "source", "states")

    def __init__(self, source: "InertGlobal | InertObject", args, kwargs=None):
        self.source = source
        self.args = args
        self.kwargs = kwargs
        self.states = []
        self.items = {}
        self.elements = []

    @property
    def name(self) -> str:
        """Name of the innermost class or function."""
        source = self.source
        while isinstance(source, InertObject):
            source = source.source
        return source.name

    def get(self, key: str, default=None):
        """The entry or attribute ``key``, if the pickle gave one."""
        for mapping in (self.items, *reversed(self.states)):
            if isinstance(mapping, dict) and key in mapping:
                return mapping[key]
        return default

    def __repr__(self) -> str:
        return f"<inert object of {self.name}>"
