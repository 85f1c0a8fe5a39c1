"""Read a pickle as data: no imports, calls to a given table only, bounded work and memory.

The standard library's ``pickletools`` reads the arguments of the opcodes and executes nothing;
their meaning is that of CPython's ``Lib/pickletools.py``.
"""

import io
import itertools
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
# Opcodes that are charged at once.
_BATCH = 256
_NO_VALUE = "takes a value that is not there"
# Keys whose hashes collide are compared one by one: so many comparisons are a step.
_COMPARED = 16
# Integers below this are their own hashes, which differ and are compared faster.
_SMALL_INT = 2**60
_COMPARED_HASHES = 128
# Steps of a key that is no text, of a part of one, of the name of a class, and of a call.
_OTHER_KEY, _KEY_PART, _NAME, _CALL = 15, 2, 10, 8
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


class _Stop(Exception):
    """The pickle has ended, with this value."""


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
        # Values below the last mark are not those of the opcodes after it.
        self._floor = 0
        self._memo: dict[Any, Any] = {}
        try:
            self._run(stream)
        except _Stop as stop:
            return stop.args[0]
        except TorchFileError as error:
            raise TorchFileError(f"pickle, before byte {stream.tell()}: {error}") from None
        except Exception as error:
            # A damaged pickle can raise anything, mostly in pickletools.
            what = printable(str(error)) or type(error).__name__
            raise TorchFileError(f"pickle damaged before byte {stream.tell()}: {what}") from None
        finally:
            del self._stack, self._marks, self._memo

    def _run(self, stream: io.BytesIO):
        """Run opcodes until _Stop is raised."""
        read, push = stream.read, self._stack.append
        steps = held = 0
        try:
            while True:
                for _ in itertools.repeat(None, _BATCH):
                    handle, read_argument, more_steps, more_held = _OPCODES[read(1)]
                    steps += more_steps
                    held += more_held
                    value = None if read_argument is None else read_argument(stream)
                    if handle is None:
                        push(value)
                    else:
                        handle(self, value)
                self._spend(steps, held)
                steps = held = 0
        except _Stop:
            self._spend(steps, held)
            raise

    def _push(self, value):
        self._stack.append(value)

    def _pop(self):
        if len(self._stack) <= self._floor:
            raise TorchFileError(_NO_VALUE)
        return self._stack.pop()

    def _top(self):
        if len(self._stack) <= self._floor:
            raise TorchFileError(_NO_VALUE)
        return self._stack[-1]

    def _pop_mark(self) -> list:
        if not self._marks:
            raise TorchFileError("takes a mark that is not there")
        start = self._marks.pop()
        self._floor = self._marks[-1] if self._marks else 0
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _check_keys(self, keys: Sequence[Any], size: int):
        """Charge new keys of a container that has ``size`` entries; refuse those not hashable."""
        self._spend(len(keys), _ENTRY * len(keys))
        for key in keys:
            if type(key) is not str:
                break
        else:
            return
        others = [key for key in keys if type(key) is not str]
        # Other hashes can be made to collide: a container of n then takes n * n / 2 comparisons.
        if _is_progression(others):
            # Numbered steps of a log. One such sequence has too few parameters for an attack.
            self._spend((size + len(others)) // _COMPARED_HASHES)
            return
        for key in others:
            self._spend(_OTHER_KEY + size // _COMPARED)
            size += 1
            if type(key) is tuple:
                # A tuple of tuples could share its parts and take exponential time.
                self._spend(_KEY_PART * len(key))
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
        self._spend(len(value) // 128, sys.getsizeof(value))
        self._push(value)

    def _container(self, value):
        self._spend(len(value) // 8, _ELEMENT * len(value))
        self._push(value)

    def _global(self, name):
        self._spend(_NAME + len(name) // 16)
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
            self._spend(_NAME)
            function = self._inert_global(function.name)
        if not isinstance(function, (InertGlobal, InertObject)):
            raise TorchFileError(f"calls a {describe(function)}")
        self._spend(_CALL, _OBJECT)
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
        self._spend(len(values) // 8, _ELEMENT * len(values))
        target.extend(values)

    def _items(self):
        """Return the dictionary on top of the stack."""
        target = self._top()
        if isinstance(target, InertObject):
            return target.items
        if type(target) is not dict:
            raise TorchFileError(f"sets entries of a {describe(target)}")
        return target

    def _fill(self, target, values):
        if len(values) % 2:
            raise TorchFileError("a key without a value")
        self._check_keys(values[::2], len(target))
        pairs = iter(values)
        # Most dictionaries are small: zip would take longer to make than they to fill.
        for key in pairs:
            target[key] = next(pairs)
        return target

    def _add_items(self, _):
        values, target = self._pop_mark(), self._top()
        if isinstance(target, InertObject):
            self._spend(len(values) // 8, _ELEMENT * len(values))
            target.elements.extend(values)
        elif type(target) is set:
            self._check_keys(values, len(target))
            target.update(values)
        else:
            raise TorchFileError(f"adds to a {describe(target)}")

    def _set_item(self, _):
        value, key = self._pop(), self._pop()
        target = self._items()
        if type(key) is not str:
            self._check_keys((key,), len(target))
        target[key] = value

    def _set_items(self, _):
        values = self._pop_mark()
        self._fill(self._items(), values)

    def _append(self, _):
        value = self._pop()
        self._append_all([value])

    def _frozen_set(self, _):
        values = self._pop_mark()
        self._check_keys(values, 0)
        self._container(frozenset(values))

    def _tuple(self, size):
        start = len(self._stack) - size
        if start < self._floor:
            raise TorchFileError(_NO_VALUE)
        values = tuple(self._stack[start:])
        del self._stack[start:]
        self._container(values)

    def _mark(self, _):
        self._floor = len(self._stack)
        self._marks.append(self._floor)

    def _pop_any(self, _):
        if self._marks and self._floor == len(self._stack):
            self._pop_mark()
        else:
            self._pop()

    def _put(self, index):
        self._memo[index] = self._top()

    def _memoize(self, _):
        self._put(len(self._memo))

    def _get(self, index):
        try:
            self._stack.append(self._memo[index])
        except KeyError:
            raise TorchFileError(
                f"refers to value {printable(str(index))}, which is not there"
            ) from None

    def _protocol(self, version):
        if version > 5:
            raise TorchFileError(f"protocol {version}, 5 is the newest known")

    def _persistent(self, value):
        self._push(self._persistent_load(value))


# What the machine does, or None to push the argument; what reads the argument, if there is one;
# and what it costs.
_Opcode = tuple[Callable | None, Callable | None, int, int]
# What an opcode costs, if not 3 and 0, in steps and bytes, besides what its handler charges.
_COSTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "MARK"), (2, 0)),
    **dict.fromkeys(("LONG1", "LONG4"), (6, 0)),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT"), (3, _CONTAINER)),
    **dict.fromkeys(("LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), (8, _CONTAINER)),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), (12, 3 * _CONTAINER)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), (4, 2 * _ENTRY)),
    **dict.fromkeys(("APPEND", "APPENDS"), (8, 0)),
    **dict.fromkeys(("ADDITEMS", "SETITEMS"), (10, 0)),
    "SETITEM": (12, _ENTRY),
    "DICT": (16, 3 * _CONTAINER),
    **dict.fromkeys(("INT", "LONG", "FLOAT"), (9, 0)),
    **dict.fromkeys(("STRING", "UNICODE", "GLOBAL"), (14, 0)),
    "INST": (20, 0),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"), (8, 0)),
    **dict.fromkeys(("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), (8, 0)),
    "BYTEARRAY8": (10, 0),
    **dict.fromkeys(("PERSID", "BINPERSID"), (24, 0)),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"), (8, 0)),
}


def _opcodes() -> dict[bytes, _Opcode]:
    """Return the meaning of every byte that can be an opcode, and of the end of the file."""
    machine = PickleMachine

    def push(value):
        return lambda self, _: self._stack.append(value)

    def refuse(message):
        def handle(self, _):
            raise TorchFileError(message)

        return handle

    def stop(self, _):
        raise _Stop(self._pop())

    handlers: dict[str, Callable | None] = {
        "APPEND": machine._append,
        "APPENDS": lambda self, _: self._append_all(self._pop_mark()),
        "ADDITEMS": machine._add_items,
        "BINPERSID": lambda self, _: self._persistent(self._pop()),
        "BUILD": machine._build,
        "DICT": lambda self, _: self._push(self._fill({}, self._pop_mark())),
        "DUP": lambda self, _: self._push(self._top()),
        "EMPTY_DICT": lambda self, _: self._stack.append({}),
        "EMPTY_LIST": lambda self, _: self._stack.append([]),
        "EMPTY_SET": lambda self, _: self._stack.append(set()),
        "EMPTY_TUPLE": push(()),
        "FRAME": lambda self, _: None,
        "FROZENSET": machine._frozen_set,
        "GLOBAL": lambda self, name: self._global(name.replace(" ", ".", 1)),
        "INST": machine._inst,
        "LIST": lambda self, _: self._container(self._pop_mark()),
        "MARK": machine._mark,
        "MEMOIZE": machine._memoize,
        "NEWFALSE": push(False),
        "NEWOBJ": machine._reduce,
        "NEWOBJ_EX": machine._new_object_ex,
        "NEWTRUE": push(True),
        "OBJ": machine._obj,
        "PERSID": machine._persistent,
        "POP": machine._pop_any,
        "POP_MARK": lambda self, _: self._pop_mark(),
        "PROTO": machine._protocol,
        "REDUCE": machine._reduce,
        "SETITEM": machine._set_item,
        "STOP": stop,
        "SETITEMS": machine._set_items,
        "STACK_GLOBAL": machine._stack_global,
        "TUPLE": lambda self, _: self._container(tuple(self._pop_mark())),
    }
    for names, handler in (
        ("INT LONG LONG1 LONG4", machine._int),
        ("GET BINGET LONG_BINGET", machine._get),
        ("PUT BINPUT LONG_BINPUT", machine._put),
        ("NONE BININT BININT1 BININT2 FLOAT BINFLOAT", None),
        ("STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE", machine._text),
        ("SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8", machine._text),
        ("BYTEARRAY8", machine._text),
        ("EXT1 EXT2 EXT4", lambda self, code: self._global(f"copyreg extension {code}")),
    ):
        handlers.update(dict.fromkeys(names.split(), handler))
    for size in (1, 2, 3):
        handlers[f"TUPLE{size}"] = lambda self, _, size=size: self._tuple(size)

    codes: dict[bytes, _Opcode] = {b"": (refuse("no end"), None, 0, 0)}
    for code in range(256):
        codes[bytes([code])] = refuse(f"unknown opcode {code:#04x}"), None, 0, 0
    for opcode in pickletools.opcodes:
        unused = f"opcode {opcode.name} is not used by torch.save"
        handle = handlers[opcode.name] if opcode.name in handlers else refuse(unused)
        steps, held = _COSTS.get(opcode.name, (3, 0))
        reader = None if opcode.arg is None else opcode.arg.reader
        codes[opcode.code.encode("latin1")] = handle, reader, steps, held + _VALUE
    return codes


_OPCODES = _opcodes()
