"""Read a pickle as data: no imports, calls to a given table only, bounded work and memory.

The standard library's ``pickletools`` decodes the opcodes and executes nothing; their meaning is
that of CPython's ``Lib/pickletools.py``.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertGlobal, InertObject, printable

# The largest model of the family with EMA and momentum needs about 300,000 opcodes and 4 MiB.
MAX_BYTES = 16 * 2**20
MAX_STEPS = 500_000
MAX_INT_BITS = 1024
_SCALARS = (str, int, float, bool, bytes, type(None))
_IDENTITY_HASHED = (InertGlobal, InertObject)


class Known:
    """A function of the table: ``build(args, spend)`` returns the value.

    ``build`` calls ``spend(steps)`` for work that grows with the size of the arguments. It raises
    TorchFileError for bad arguments, and returns ``NotImplemented`` to make the call inert.
    """

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable):
        self.name = name
        self.build = build


class Constant:
    """A global of the table that stands for itself: a storage type or a dtype."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value):
        self.name = name
        self.value = value


def describe(value) -> str:
    """Describe a value in a few words, without looking into it."""
    if isinstance(value, (InertObject, InertGlobal)):
        return repr(value)
    if isinstance(value, (Known, Constant)):
        return value.name
    if isinstance(value, (dict, list, tuple, set)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, str):
        return f"str '{printable(value)}'"
    if value is None or type(value) in (bool, int, float):
        return f"{type(value).__name__} {value}" if value is not None else "None"
    return type(value).__name__


class PickleMachine:
    """Runs the pickles of a stream, one after the other.

    Args:
      table: known globals by "module.name"; every other one becomes an InertGlobal.
      persistent_load: returns the value of a persistent id.

    Attributes:
      inert: names of all unknown globals so far, each once, in order of appearance.
    """

    def __init__(
        self,
        table: Mapping[str, Known | Constant],
        persistent_load: Callable[[object], object],
    ):
        self.inert: dict[str, InertGlobal] = {}
        self._table = table
        self._persistent_load = persistent_load
        self._steps = 0

    def load(self, stream: io.BytesIO):
        """Return the value of the pickle at the stream's position, and move behind it.

        Raises:
          TorchFileError: the pickle is damaged, or exceeds the limits of this module.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}
        position = stream.tell()
        try:
            for opcode, argument, at in pickletools.genops(stream):
                position = at
                self._spend(1)
                if opcode.name == "STOP":
                    return self._pop()
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise TorchFileError(f"opcode {opcode.name} is not used by torch.save")
                handler(self, argument)
            raise TorchFileError("no end")
        except TorchFileError as error:
            raise TorchFileError(f"pickle, at byte {position}: {error}") from None
        except Exception as error:
            # A damaged pickle can raise anything, mostly in pickletools.
            what = printable(str(error)) or type(error).__name__
            raise TorchFileError(f"pickle damaged at or after byte {position}: {what}") from None
        finally:
            del self._stack, self._marks, self._memo

    def _spend(self, steps):
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TorchFileError(f"more than {MAX_STEPS:,} steps, no file of weights needs so many")

    def _push(self, value):
        self._stack.append(value)

    def _pop(self):
        # Values below a mark are not those of the opcodes after it.
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise TorchFileError("takes a value that is not there")
        return self._stack.pop()

    def _top(self):
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list:
        if not self._marks:
            raise TorchFileError("takes a mark that is not there")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _key(self, key, size):
        """Return a key for a container of ``size`` entries, if its hash is cheap."""
        if type(key) is str:
            return key
        # Other hashes can be made to collide: a container of n then takes n * n / 2 comparisons.
        self._spend(size // 64)
        if type(key) is tuple:
            # A tuple of tuples could share its parts and take exponential time.
            self._spend(len(key))
            if all(type(part) in _SCALARS for part in key):
                return key
        elif type(key) in _SCALARS or isinstance(key, _IDENTITY_HASHED):
            return key
        raise TorchFileError(f"a {describe(key)} is no key")

    def _int(self, value):
        if type(value) is int and value.bit_length() > MAX_INT_BITS:
            raise TorchFileError(f"an integer of {value.bit_length():,} bits")
        self._push(value)

    def _global(self, name):
        known = self._table.get(name)
        if known is None:
            inert = InertGlobal(name)
            known = self.inert.setdefault(inert.name, inert)
        self._push(known)

    def _call(self, function, args, kwargs=None):
        if isinstance(function, Known):
            if not kwargs and type(args) is tuple:
                value = function.build(args, self._spend)
                if value is not NotImplemented:
                    self._push(value)
                    return
            inert = InertGlobal(function.name)
            function = self.inert.setdefault(inert.name, inert)
        if not isinstance(function, (InertGlobal, InertObject)):
            raise TorchFileError(f"calls a {describe(function)}")
        self._push(InertObject(function, args, kwargs))

    def _stack_global(self, _):
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise TorchFileError(f"a global named by a {describe(module)} and a {describe(name)}")
        self._global(f"{module}.{name}")

    def _reduce(self, _):
        args, function = self._pop(), self._pop()
        self._call(function, args)

    def _new_object_ex(self, _):
        kwargs, args, function = self._pop(), self._pop(), self._pop()
        self._call(function, args, kwargs)

    def _inst(self, name):
        args = tuple(self._pop_mark())
        self._global(name.replace(" ", ".", 1))
        self._call(self._pop(), args)

    def _obj(self, _):
        values = self._pop_mark()
        if not values:
            raise TorchFileError("makes an object of nothing")
        self._call(values[0], tuple(values[1:]))

    def _build(self, _):
        state, target = self._pop(), self._top()
        if isinstance(target, InertObject):
            target.states.append(state)
        elif type(target) is not dict:
            raise TorchFileError(f"sets the state of a {describe(target)}")
        # A state dict's own attribute, _metadata, is of no use here.

    def _append_all(self, values):
        target = self._top()
        if isinstance(target, InertObject):
            target = target.elements
        if type(target) is not list:
            raise TorchFileError(f"appends to a {describe(target)}")
        target.extend(values)

    def _set_items(self, values):
        target = self._top()
        if isinstance(target, InertObject):
            target = target.items
        if type(target) is not dict:
            raise TorchFileError(f"sets entries of a {describe(target)}")
        self._fill(target, values)

    def _fill(self, target, values):
        if len(values) % 2:
            raise TorchFileError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self._key(key, len(target))] = value
        return target

    def _add_items(self, _):
        values, target = self._pop_mark(), self._top()
        if isinstance(target, InertObject):
            target.elements.extend(values)
        elif type(target) is set:
            for value in values:
                target.add(self._key(value, len(target)))
        else:
            raise TorchFileError(f"adds to a {describe(target)}")

    def _set_item(self, _):
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _append(self, _):
        value = self._pop()
        self._append_all([value])

    def _frozen_set(self, _):
        values = self._pop_mark()
        self._push(frozenset(self._key(value, len(values)) for value in values))

    def _empty_set(self, _):
        self._spend(3)
        self._push(set())

    def _tuple(self, size):
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def _mark(self, _):
        self._marks.append(len(self._stack))

    def _pop_any(self, _):
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _put(self, index):
        self._memo[index] = self._top()

    def _memoize(self, _):
        self._put(len(self._memo))

    def _get(self, index):
        if index not in self._memo:
            raise TorchFileError(f"refers to value {printable(str(index))}, which is not there")
        self._push(self._memo[index])

    def _protocol(self, version):
        if version > 5:
            raise TorchFileError(f"protocol {version}, 5 is the newest known")

    def _persistent(self, value):
        self._push(self._persistent_load(value))


def _handlers() -> dict[str, Callable]:
    machine = PickleMachine

    def constant(value):
        return lambda self, _: self._push(value)

    handlers = {
        "APPEND": machine._append,
        "APPENDS": lambda self, _: self._append_all(self._pop_mark()),
        "ADDITEMS": machine._add_items,
        "BINPERSID": lambda self, _: self._persistent(self._pop()),
        "BUILD": machine._build,
        "DICT": lambda self, _: self._push(self._fill({}, self._pop_mark())),
        "DUP": lambda self, _: self._push(self._top()),
        "EMPTY_DICT": lambda self, _: self._push({}),
        "EMPTY_LIST": lambda self, _: self._push([]),
        "EMPTY_SET": machine._empty_set,
        "EMPTY_TUPLE": constant(()),
        "FRAME": lambda self, _: None,
        "FROZENSET": machine._frozen_set,
        "GLOBAL": lambda self, name: self._global(name.replace(" ", ".", 1)),
        "INST": machine._inst,
        "LIST": lambda self, _: self._push(self._pop_mark()),
        "MARK": machine._mark,
        "MEMOIZE": machine._memoize,
        "NEWFALSE": constant(False),
        "NEWOBJ": machine._reduce,
        "NEWOBJ_EX": machine._new_object_ex,
        "NEWTRUE": constant(True),
        "NONE": constant(None),
        "OBJ": machine._obj,
        "PERSID": machine._persistent,
        "POP": machine._pop_any,
        "POP_MARK": lambda self, _: self._pop_mark(),
        "PROTO": machine._protocol,
        "REDUCE": machine._reduce,
        "SETITEM": machine._set_item,
        "SETITEMS": lambda self, _: self._set_items(self._pop_mark()),
        "STACK_GLOBAL": machine._stack_global,
        "TUPLE": lambda self, _: self._push(tuple(self._pop_mark())),
    }
    for names, handler in (
        ("INT BININT BININT1 BININT2 LONG LONG1 LONG4", machine._int),
        ("GET BINGET LONG_BINGET", machine._get),
        ("PUT BINPUT LONG_BINPUT", machine._put),
        ("FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE", machine._push),
        ("SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8", machine._push),
        ("BYTEARRAY8", machine._push),
        (
            "EXT1 EXT2 EXT4",
            lambda self, code: self._global(f"copyreg extension {code}"),
        ),
    ):
        handlers.update(dict.fromkeys(names.split(), handler))
    for size in (1, 2, 3):
        handlers[f"TUPLE{size}"] = lambda self, _, size=size: self._tuple(size)
    return handlers


_HANDLERS = _handlers()
