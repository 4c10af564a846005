"""The pickle inside a torch .bin shard, interpreted as data: it can name tensors and do nothing else.

A pickle is a program for a small stack machine. This one knows the opcodes that torch.save writes
for a table of tensors; the few globals among them are names in ALLOWED_GLOBALS and are never
imported. Anything else is refused before it has an effect.
Sources: Lib/pickletools.py; torch/_utils.py: _rebuild_tensor_v2; torch/serialization.py.
"""

from __future__ import annotations

import encodings.raw_unicode_escape  # noqa: F401 - pickletools decodes by it: nothing is imported while a file is read
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsafeCheckpoint

STORAGE_DTYPES = {
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ALLOWED_GLOBALS = frozenset({ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGE_DTYPES})
MAX_DIMENSION = 1 << 40


@dataclass(frozen=True, slots=True)
class Global:
    """A name that was written, not an object that was imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """One zip entry of raw values: data/KEY, n_values of dtype."""

    dtype: str
    key: str
    n_values: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor over a storage; offset and stride count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """Where a tuple's or table's items begin on the stack."""


def read_pickle_index(data: bytes) -> dict[str, View]:
    """Tensor names and views; UnsafeCheckpoint for any opcode, global or call beyond a table of tensors."""
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in opcodes that are refused anyway
            for opcode, argument, _ in pickletools.genops(data):
                machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise UnsafeCheckpoint(f"its pickle is not one of tensors: {error}; nothing in it was run") from error
    if not isinstance(machine.result, dict):
        raise UnsafeCheckpoint(f"its pickle holds a {type(machine.result).__name__}, not a table of tensors")
    for name, value in machine.result.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise UnsafeCheckpoint(f"its pickle holds {str(name)[:60]!r}, which is not a tensor: not converted")
    return machine.result


class _Machine:
    """The stack, the memo and the result; step() does one opcode or raises."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in LITERALS:
            self.stack.append(argument)
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        else:
            raise UnsafeCheckpoint(f"its pickle uses the opcode {name}, which no table of tensors needs: refused")

    def pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _Mark:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise ValueError("no mark on the stack")

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the stack is too short")
        items = self.stack[-count:]
        if any(item is _Mark for item in items):
            raise ValueError("a mark inside a tuple")
        self.stack[-count:] = [tuple(items)]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something other than a table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise ValueError(f"a key of type {type(key).__name__}")
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for something other than a list")
        self.stack[-1].extend(items)

    def find_global(self, name: str) -> None:
        if name not in ALLOWED_GLOBALS:
            raise UnsafeCheckpoint(
                f"its pickle refers to {name.replace(' ', '.')[:80]!r}, code and not data: refused, nothing was run"
            )
        self.stack.append(Global(name))

    def load_storage(self) -> None:
        kind, storage, key, _, n_values = self.stack.pop()
        if kind != "storage" or not isinstance(storage, Global) or storage.name not in STORAGE_DTYPES:
            raise ValueError("a persistent id that is not a storage")
        if type(key) is not str or not key.isalnum() or type(n_values) is not int or n_values < 0:
            raise ValueError(f"a storage {key!r} of {n_values!r} values")
        self.stack.append(Storage(STORAGE_DTYPES[storage.name], key, n_values))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, Global) else None
        if name not in CALLS or not isinstance(arguments, tuple):
            raise UnsafeCheckpoint(f"its pickle calls {name or type(function).__name__}: refused, nothing was run")
        self.stack.append(CALLS[name](*arguments))

    def drop_state(self) -> None:
        """BUILD: torch attaches _metadata to the table; it is of no use here and is left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(state, dict) or not isinstance(target, dict):
            raise ValueError("a state for something other than a table")

    def stop(self) -> None:
        if len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} objects at its end")
        self.result = self.stack.pop()


def _ordered_dict() -> dict[str, Any]:
    return {}


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> View:
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(type(n) is not int or not 0 <= n <= MAX_DIMENSION for n in sizes):
        raise ValueError("a tensor without a storage, or of impossible size")
    if len(shape) != len(stride) or len(shape) > 8:
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    return View(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(view: Any, requires_grad: Any, hooks: Any) -> View:
    if not isinstance(view, View):
        raise ValueError("a parameter that is not a tensor")
    return view


CALLS: dict[str | None, Callable[..., Any]] = {
    ORDERED_DICT: _ordered_dict,
    REBUILD_TENSOR: _rebuild_tensor,
    REBUILD_PARAMETER: _rebuild_parameter,
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _Mark,
}
LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "GLOBAL": lambda m, a: m.find_global(a),
    "STACK_GLOBAL": lambda m, a: m.find_global(" ".join(map(str, (m.stack.pop(-2), m.stack.pop())))),
    "BINPERSID": lambda m, a: m.load_storage(),
    "REDUCE": lambda m, a: m.call(),
    "BUILD": lambda m, a: m.drop_state(),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.push_tuple(1),
    "TUPLE2": lambda m, a: m.push_tuple(2),
    "TUPLE3": lambda m, a: m.push_tuple(3),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, a: m.append_items([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append_items(m.pop_to_mark()),
    "BINPUT": lambda m, a: m.memo.__setitem__(a, m.stack[-1]),
    "LONG_BINPUT": lambda m, a: m.memo.__setitem__(a, m.stack[-1]),
    "MEMOIZE": lambda m, a: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "STOP": lambda m, a: m.stop(),
}
