"""Read a pickle as data: no imports, calls to a given table only, bounded work and memory.

The standard library's ``pickletools`` decodes the opcodes and executes nothing; their meaning is
that of CPython's ``Lib/pickletools.py``.
"""

import io
import pickletools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotnet_jax.weights.torch_files.budget import Budget
from cotnet_jax.weights.torch_files.errors import TorchFileError
from cotnet_jax.weights.torch_files.inert import InertGlobal, InertObject, printable

# Estimates of memory in bytes, which the budget counts: of any opcode's value and its place on
# the stack, and in addition of a container, an element, an entry and an inert object.
_VALUE, _CONTAINER, _ELEMENT, _ENTRY, _OBJECT = 24, 64, 8, 64, 280
# Keys whose hashes collide are compared one by one: so many comparisons are a step.
_COMPARED = 64
# Integers below this are their own hashes, which differ and are compared faster.
_SMALL_INT = 2**60
_COMPARED_HASHES = 512
_SCALARS = (str, int, float, bool, bytes, type(None))
_IDENTITY_HASHED = (InertGlobal, InertObject)


class Known:
    """A function of the table: ``build(args, budget)`` returns the value.

    ``build`` charges the budget for work and memory that grow with the arguments. It raises
    TorchFileError for bad ones, and returns ``NotImplemented`` to make the call inert.
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


def describe_key(key) -> str:
    """Describe a key of a dictionary: a name is itself, and nothing long is looked into."""
    return printable(key) if isinstance(key, str) else describe(key)


def _is_progression(keys):
    """Return whether keys are small integers with equal distances, in order."""
    if len(keys) < 3 or any(type(key) is not int or abs(key) >= _SMALL_INT for key in keys):
        return False
    distance = keys[1] - keys[0]
    return distance != 0 and keys == [keys[0] + i * distance for i in range(len(keys))]


class PickleMachine:
    """Runs the pickles of a stream, one after the other.

    Args:
      table: known globals by "module.name"; every other one becomes an InertGlobal.
      persistent_load: returns the value of a persistent id.
      budget: charged for every opcode.

    Attributes:
      inert: names of all unknown globals so far, each once, in order of appearance.
    """

    def __init__(
        self,
        table: Mapping[str, Known | Constant],
        persistent_load: Callable[[object], object],
        budget: Budget,
    ):
        self.inert: dict[str, InertGlobal] = {}
        self._table = table
        self._persistent_load = persistent_load
        self._budget = budget
        self._limits = budget.limits
        self._spend = budget.spend

    def load(self, stream: io.BytesIO):
        """Return the value of the pickle at the stream's position, and move behind it.

        Raises:
          TorchFileError: the pickle is damaged, or exceeds the budget.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}
        position = stream.tell()
        try:
            for opcode, argument, at in pickletools.genops(stream):
                position = at
                self._spend(1, _VALUE)
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

    def _check_keys(self, keys: Sequence[Any], size: int):
        """Charge new keys of a container that has ``size`` entries; refuse those not hashable."""
        self._spend(len(keys) // 8, _ENTRY * len(keys))
        others = [key for key in keys if type(key) is not str]
        if not others:
            return
        # Other hashes can be made to collide: a container of n then takes n * n / 2 comparisons.
        if _is_progression(others):
            # Numbered steps of a log. One such sequence has too few parameters for an attack.
            self._spend((size + len(others)) // _COMPARED_HASHES)
            return
        for key in others:
            self._spend(size // _COMPARED)
            size += 1
            if type(key) is tuple:
                # A tuple of tuples could share its parts and take exponential time.
                self._spend(len(key))
                if all(type(part) in _SCALARS for part in key):
                    continue
            elif type(key) in _SCALARS or isinstance(key, _IDENTITY_HASHED):
                continue
            raise TorchFileError(f"a {describe(key)} is no key")

    def _int(self, value):
        if type(value) is int and value.bit_length() > self._limits.int_bits:
            raise TorchFileError(f"an integer of {value.bit_length():,} bits")
        self._push(value)

    def _text(self, value):
        self._spend(len(value) // 1024, sys.getsizeof(value))
        self._push(value)

    def _container(self, value):
        self._spend(0, _CONTAINER + _ELEMENT * len(value))
        self._push(value)

    def _global(self, name):
        if len(name) > self._limits.name_length:
            raise TorchFileError(f"a class or function whose name has {len(name):,} characters")
        known = self._table.get(name)
        if known is None:
            known = self._inert_global(name)
        self._push(known)

    def _inert_global(self, name):
        inert = InertGlobal(name)
        known = self.inert.setdefault(inert.name, inert)
        if len(self.inert) > self._limits.globals:
            raise TorchFileError(f"names more than {self._limits.globals:,} classes and functions")
        return known

    def _call(self, function, args, kwargs=None):
        if isinstance(function, Known):
            if not kwargs and type(args) is tuple:
                value = function.build(args, self._budget)
                if value is not NotImplemented:
                    self._push(value)
                    return
            function = self._inert_global(function.name)
        if not isinstance(function, (InertGlobal, InertObject)):
            raise TorchFileError(f"calls a {describe(function)}")
        self._spend(1, _OBJECT)
        self._push(InertObject(function, args, kwargs))

    def _stack_global(self, _):
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise TorchFileError(f"a global named by a {describe(module)} and a {describe(name)}")
        # Before they are joined: the same long text can be used many times.
        if len(module) + len(name) > self._limits.name_length:
            raise TorchFileError(
                f"a class or function whose name has {len(module) + len(name):,} characters"
            )
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
        self._spend(0, _ELEMENT * len(values))
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
        keys = values[::2]
        self._check_keys(keys, len(target))
        target.update(zip(keys, values[1::2], strict=True))
        return target

    def _add_items(self, _):
        values, target = self._pop_mark(), self._top()
        if isinstance(target, InertObject):
            self._spend(0, _ELEMENT * len(values))
            target.elements.extend(values)
        elif type(target) is set:
            self._check_keys(values, len(target))
            target.update(values)
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
        self._check_keys(values, 0)
        self._spend(2, 2 * _CONTAINER)
        self._container(frozenset(values))

    def _empty_set(self, _):
        self._spend(3, 3 * _CONTAINER)
        self._push(set())

    def _tuple(self, size):
        values = [self._pop() for _ in range(size)]
        self._container(tuple(reversed(values)))

    def _mark(self, _):
        self._marks.append(len(self._stack))

    def _pop_any(self, _):
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _put(self, index):
        self._spend(0, _ENTRY)
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
        "DICT": lambda self, _: self._container(self._fill({}, self._pop_mark())),
        "DUP": lambda self, _: self._push(self._top()),
        "EMPTY_DICT": lambda self, _: self._container({}),
        "EMPTY_LIST": lambda self, _: self._container([]),
        "EMPTY_SET": machine._empty_set,
        "EMPTY_TUPLE": constant(()),
        "FRAME": lambda self, _: None,
        "FROZENSET": machine._frozen_set,
        "GLOBAL": lambda self, name: self._global(name.replace(" ", ".", 1)),
        "INST": machine._inst,
        "LIST": lambda self, _: self._container(self._pop_mark()),
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
        "TUPLE": lambda self, _: self._container(tuple(self._pop_mark())),
    }
    for names, handler in (
        ("INT BININT BININT1 BININT2 LONG LONG1 LONG4", machine._int),
        ("GET BINGET LONG_BINGET", machine._get),
        ("PUT BINPUT LONG_BINPUT", machine._put),
        ("FLOAT BINFLOAT", machine._push),
        ("STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE", machine._text),
        ("SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8", machine._text),
        ("BYTEARRAY8", machine._text),
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
