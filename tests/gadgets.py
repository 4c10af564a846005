"""Pickles that would run code, one of every class of trick that scanners have been fooled by; none may work here.

Sources: the advisories of picklescan, fickling, modelaudit and torch.load(weights_only=True).
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from typing import Any

CANARY = "/tmp/fourbit-canary-that-must-never-exist"


@dataclass(frozen=True, slots=True)
class Gadget:
    """A pickle and what it tries."""

    name: str
    data: bytes


class _Reduce:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global_call(module: str, name: str, argument: str) -> bytes:
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + _text(argument) + b"\x85R."


def _stack_global_call(module: str, name: str, argument: str) -> bytes:
    return b"\x80\x04" + _text(module) + _text(name) + b"\x93" + _text(argument) + b"\x85R."


COMMAND = f"touch {CANARY}"
SOURCE = f"open({CANARY!r}, 'w')"
CALLABLES = {
    "os.system": ("os", "system", COMMAND),
    "posix.system": ("posix", "system", COMMAND),
    "eval": ("builtins", "eval", SOURCE),
    "exec": ("builtins", "exec", SOURCE),
    "compile": ("builtins", "compile", SOURCE),
    "__builtin__.eval": ("__builtin__", "eval", SOURCE),
    "import": ("builtins", "__import__", "antigravity"),
    "pip.main": ("pip", "main", "install"),
    "pkgutil.resolve_name": ("pkgutil", "resolve_name", "os:system"),
    "runpy": ("runpy", "run_path", CANARY),
    "subprocess": ("subprocess", "getoutput", COMMAND),
    "webbrowser": ("webbrowser", "open", "http://127.0.0.1:9"),
    "importlib": ("importlib", "import_module", "antigravity"),
    "timeit": ("timeit", "timeit", SOURCE),
    "code": ("code", "interact", SOURCE),
    "pdb": ("pdb", "run", SOURCE),
    "cProfile": ("cProfile", "run", SOURCE),
    "bdb": ("bdb", "Bdb", SOURCE),
    "numpy.load": ("numpy", "load", CANARY),
    "torch.load": ("torch", "load", CANARY),
    "torch.hub": ("torch.hub", "load", CANARY),
    "torch._utils other": ("torch._utils", "_import_dotted_name", "os.system"),
    "torch Storage by dots": ("torch", "FloatStorage.__reduce__", COMMAND),
    "dotted name": ("collections", "OrderedDict.__class__", COMMAND),
    "asyncio": ("asyncio.unix_events", "_UnixSubprocessTransport._start", COMMAND),
    "ctypes": ("ctypes", "CDLL", CANARY),
    "operator": ("operator", "attrgetter", "system"),
    "functools": ("functools", "partial", "os.system"),
    "shutil": ("shutil", "rmtree", CANARY),
    "OrderedDict with arguments": ("collections", "OrderedDict", "ab"),
}
_OS_SYSTEM = b"cos\nsystem\n"
_ODD = {
    "INST": b"(" + _text(COMMAND) + b"ios\nsystem\n.",
    "OBJ": b"(" + _OS_SYSTEM + _text(COMMAND) + b"o.",
    "NEWOBJ": b"\x80\x02" + _OS_SYSTEM + _text(COMMAND) + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + _OS_SYSTEM + _text(COMMAND) + b"\x85}\x92.",
    "BUILD __setstate__": b"\x80\x02ccollections\nOrderedDict\n)R}"
    + _text("__setstate__")
    + _OS_SYSTEM
    + b"sb"
    + _text(COMMAND)
    + b"b.",
    "POP hides the call": b"\x80\x02" + _OS_SYSTEM + _text(COMMAND) + b"\x85R0}.",
    "POP_MARK hides the call": b"\x80\x02(" + _OS_SYSTEM + _text(COMMAND) + b"\x85R1}.",
    "memo swaps the callable": b"\x80\x02ccollections\nOrderedDict\nq\x000"
    + _OS_SYSTEM
    + b"q\x000h\x00"
    + _text(COMMAND)
    + b"\x85R.",
    "EXT1": b"\x80\x02\x82\x01" + _text(COMMAND) + b"\x85R.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0" + _text(COMMAND) + b"\x85R.",
    "PERSID": b"Pos.system\n.",
    "persistent id that is a call": b"\x80\x02" + _OS_SYSTEM + _text(COMMAND) + b"\x85RQ.",
    "second pickle after STOP": b"\x80\x02}." + _global_call("os", "system", COMMAND),
    "opcode after an error": b"\x80\x02\xff" + _global_call("os", "system", COMMAND),
    "DUP": b"\x80\x02" + _OS_SYSTEM + b"2" + _text(COMMAND) + b"\x85R.",
    "STACK_GLOBAL from the memo": b"\x80\x04"
    + _text("os")
    + b"\x94"
    + _text("system")
    + b"\x94h\x00h\x01\x93"
    + _text(COMMAND)
    + b"\x85R.",
    "STACK_GLOBAL from a call": b"\x80\x04ccollections\nOrderedDict\n)R" + _text("system") + b"\x93.",
    "GLOBAL with a newline trick": b"\x80\x02ctorch\nFloatStorage\rsystem\n" + _text(COMMAND) + b"\x85R.",
    "GLOBAL without a module": b"\x80\x02c\nsystem\n" + _text(COMMAND) + b"\x85R.",
    "READONLY_BUFFER": b"\x80\x05\x98.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "BYTEARRAY8 of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "LONG4 of a gigabyte": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
    "BINUNICODE of 4 GB": b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b".",
    "decimal LONG of many digits": b"L" + b"9" * 5000 + b"L\n.",
    "deep nesting": b"\x80\x02" + b"(" * 100_000 + b".",
    "a table in itself": b"\x80\x02}q\x00" + _text("x") + b"h\x00s.",
    "unhashable key": b"\x80\x02}]" + _text("x") + b"s.",
    "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
}
GADGETS = (
    *(Gadget(f"{name} by GLOBAL", _global_call(*parts)) for name, parts in CALLABLES.items()),
    *(Gadget(f"{name} by STACK_GLOBAL", _stack_global_call(*parts)) for name, parts in CALLABLES.items()),
    *(Gadget(name, data) for name, data in _ODD.items()),
    *(
        Gadget(f"pickled call, protocol {protocol}", pickle.dumps(_Reduce(os.system, COMMAND), protocol=protocol))
        for protocol in range(6)
    ),
)
