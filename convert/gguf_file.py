"""One GGUF file, written in any order under a temporary name and published whole or not at all.

    .NAME.PID.part  ->  tensors at their places, then the header  ->  fsync, read back, rename to NAME

The layout of the whole file is known before the first tensor is read, so its size is too: disk
that is too small is refused at the start. Source of the format: see engine/gguf_header.py.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from gguf.constants import GGMLQuantizationType

from convert.blocks import row_bytes
from engine.errors import DoesNotFit, OutputError
from engine.gguf_header import read_header
from engine.host import disk_free_bytes

ALIGNMENT = 32
SPARE_DISK_BYTES = 64 << 20
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
        offset += _padded(n_bytes)
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
    return header + bytes(_padded(len(header)) - len(header))


class GGUFFile:
    """An unpublished file: threads write() slices of tensors, publish() makes it the real one."""

    def __init__(self, fd: int, temporary: Path, final: Path, slots: Sequence[Slot], data_offset: int) -> None:
        self._fd, self._temporary, self._final = fd, temporary, final
        self._slots, self._data_offset = tuple(slots), data_offset

    def write(self, slot: Slot, offset: int, data: np.ndarray | bytes | memoryview) -> None:
        """Write bytes of one tensor, offset from the tensor's start; safe from several threads."""
        view = memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")
        if offset < 0 or offset + len(view) > slot.n_bytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit {slot.name}, {slot.n_bytes} bytes")
        self._write_at(self._data_offset + slot.offset + offset, view)

    def publish(self, entries: Sequence[Entry]) -> int:
        """Write the header, make the file durable, read it back, give it its name; its size in bytes."""
        header = header_bytes(entries, self._slots)
        if len(header) != self._data_offset:
            raise ValueError(f"the header has {len(header)} bytes, {self._data_offset} were planned")
        self._write_at(0, memoryview(header))
        os.fsync(self._fd)
        n_bytes = self._read_back()
        os.replace(self._temporary, self._final)
        _sync_folder(self._final.parent)
        return n_bytes

    def _write_at(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def _read_back(self) -> int:
        header = read_header(self._temporary)
        found = [(t.name, t.shape, t.qtype, t.offset, t.n_bytes) for t in header.tensors]
        start = self._data_offset
        if found != [(s.name, s.shape, s.qtype, start + s.offset, s.n_bytes) for s in self._slots]:
            raise OutputError(f"{self._temporary} reads back other than it was written: check the disk")
        return header.file_bytes


@contextlib.contextmanager
def create(path: Path, entries: Sequence[Entry], slots: Sequence[Slot]) -> Iterator[GGUFFile]:
    """An unpublished file at its full size; removed on the way out unless it was published.

    The entries given here and to publish() may differ in values, not in their size in bytes.
    Raises OutputError where it cannot be written, DoesNotFit where the disk is too small.
    """
    data_offset = len(header_bytes(entries, slots))
    n_bytes = data_offset + max((s.offset + _padded(s.n_bytes) for s in slots), default=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    fd = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _check_disk(path, n_bytes)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _reserve(fd, n_bytes)
        yield GGUFFile(fd, temporary, path, slots, data_offset)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if fd >= 0:
            os.close(fd)
            temporary.unlink(missing_ok=True)


def _check_disk(path: Path, n_bytes: int) -> None:
    free = disk_free_bytes(path.parent)
    if free < n_bytes + SPARE_DISK_BYTES:
        raise DoesNotFit(
            f"{path} needs {n_bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free: "
            "make room, or choose another place with --out"
        )


def _reserve(fd: int, n_bytes: int) -> None:
    """Take the disk now where the file system can, so that a full disk is found out before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, n_bytes)
    else:
        os.ftruncate(fd, n_bytes)


def _remove_abandoned(path: Path) -> None:
    """Remove temporaries of this output whose process is gone; another run may be writing its own."""
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _padded(n_bytes: int) -> int:
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
