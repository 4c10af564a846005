"""The bytes of a GGUF file: its header, and the place of every tensor, known before the first is read.

Source of the format: see engine/gguf_header.py. Writing is in output_file.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from convert.blocks import row_bytes

ALIGNMENT = 32
KINDS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata value: kind is str, u32, i32, u64, f32, bool, [str], [i32] or [f32]."""

    key: str
    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place: shape in ggml's order, offset from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    qtype: str
    offset: int
    n_bytes: int


def layout(tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[Slot, ...]:
    """Places for tensors of (name, ggml shape, qtype), in the order given."""
    slots, offset = [], 0
    for name, shape, qtype in tensors:
        n_rows = int(np.prod(shape[1:], dtype=np.int64))
        n_bytes = n_rows * row_bytes(qtype, shape[0])
        slots.append(Slot(name, shape, qtype, offset, n_bytes))
        offset += padded(n_bytes)
    return tuple(slots)


def header_bytes(entries: Sequence[Entry], slots: Sequence[Slot]) -> bytes:
    """The header of a file, padded to where its tensor data begins."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(slots), len(entries))]
    for entry in entries:
        parts += [_string(entry.key), _value(entry.kind, entry.value)]
    for slot in slots:
        parts.append(_string(slot.name) + struct.pack("<I", len(slot.shape)))
        parts.append(struct.pack(f"<{len(slot.shape)}Q", *slot.shape))
        parts.append(struct.pack("<IQ", int(GGMLQuantizationType[slot.qtype]), slot.offset))
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def padded(n_bytes: int) -> int:
    """A size rounded up to the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _string(value: str | bytes) -> bytes:
    data = value.encode("utf-8") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _value(kind: str, value: Any) -> bytes:
    if kind == "str":
        return struct.pack("<I", STRING) + _string(value)
    if kind == "[str]":
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if kind.startswith("["):
        number, form = KINDS[kind[1:-1]]
        return struct.pack("<IIQ", ARRAY, number, len(value)) + np.asarray(value, np.dtype(form)).tobytes()
    number, form = KINDS[kind]
    return struct.pack("<I", number) + struct.pack(form, value)
