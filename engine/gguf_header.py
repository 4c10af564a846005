"""The header of a GGUF file, read with every length checked against the file before it is trusted.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv    x    | key string | value type u32 | value
    n_tensors x  | name string | n_dims u32 | ne u64[n_dims] | type u32 | offset u64
    padding to the alignment, then the tensor data

All numbers little-endian; a string is a u64 length and that many bytes. Arrays stay on disk
until asked for: a vocabulary of 152 k strings must not cost the load of a model.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import GGUFError

MAX_ENTRIES = 1 << 20  # keys or tensors; the largest real files have a few thousand
MAX_ALIGNMENT = 1 << 16
MAX_NAME_BYTES = 64  # GGML_MAX_NAME, with its closing zero
U32, STRING, ARRAY = 4, 8, 9
SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?")))
SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: shape in ggml's order (ne[0], the row length, first); offset from the file's start."""

    name: str
    shape: tuple[int, ...]
    qtype: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Array:
    """An array value: its element type, count and place in the file."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says; metadata arrays are `Array` until read by strings() or numbers()."""

    path: Path
    file_bytes: int
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data_offset: int
    kinds: Mapping[str, int]  # value type of each key: SCALARS, STRING, ARRAY

    def strings(self, key: str) -> list[bytes]:
        """The elements of a string array, as bytes; GGUFError when the key is absent or of another type."""
        array = self._array(key, STRING)
        with self.path.open("rb") as file, _mapped(file.fileno()) as data:
            return _Cursor(self.path, data, array.offset).strings(array.count)

    def numbers(self, key: str) -> np.ndarray:
        """The elements of a number array, shape (count,); GGUFError when the key is absent or holds strings."""
        array = self._array(key, None)
        dtype = np.dtype(SCALARS[array.kind])
        return np.fromfile(self.path, dtype=dtype, count=array.count, offset=array.offset)

    def _array(self, key: str, kind: int | None) -> Array:
        value = self.metadata.get(key)
        if not isinstance(value, Array) or (value.kind == STRING) != (kind == STRING):
            wanted = "strings" if kind == STRING else "numbers"
            raise GGUFError(f"{self.path}: {key} is not an array of {wanted}")
        return value


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; GGUFError says what is wrong with it and where."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            if file_bytes < 24:
                raise GGUFError(f"{path} is not a GGUF file: it has {file_bytes} bytes")
            with _mapped(file.fileno()) as data:
                return _parse(path, data)
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror}") from error


def _mapped(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)


def _parse(path: Path, data: mmap.mmap) -> Header:
    if data[:4] != b"GGUF":
        raise GGUFError(f"{path} is not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'")
    cursor = _Cursor(path, data, 4)
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise GGUFError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    n_tensors, n_kv = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(n_kv):
        key = cursor.text()
        if key in metadata or not key:
            raise GGUFError(f"{path}: the key {key[:80]!r} occurs twice or is empty")
        kinds[key] = cursor.scalar("<I")
        metadata[key] = cursor.value(kinds[key])
    infos = [cursor.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    is_number = kinds.get("general.alignment", U32) == U32
    if not is_number or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GGUFError(f"{path}: the alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = _placed(path, infos, start, alignment, len(data))
    return Header(path, len(data), version, metadata, tensors, start, kinds)


def _placed(path: Path, infos: list[Tensor], start: int, alignment: int, file_bytes: int) -> tuple[Tensor, ...]:
    """Tensors at absolute offsets; each aligned, inside the file, overlapping none, named once."""
    placed = [Tensor(t.name, t.shape, t.qtype, start + t.offset, t.n_bytes) for t in infos]
    if len({t.name for t in placed}) != len(placed):
        raise GGUFError(f"{path}: two tensors have the same name")
    end, previous = start, "the header"
    for tensor in sorted(placed, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset < end or (tensor.offset - start) % alignment:
            raise GGUFError(f"{path}: tensor {tensor.name} at {tensor.offset} overlaps {previous} or is not aligned")
        end, previous = tensor.offset + tensor.n_bytes, tensor.name
        if end > file_bytes:
            raise GGUFError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {end}, the file has {file_bytes}; "
                "convert or download it again"
            )
    return tuple(placed)


class _Cursor:
    """A position in the mapped file that never moves past its end."""

    def __init__(self, path: Path, data: mmap.mmap, offset: int) -> None:
        self.path, self.data, self.offset = path, data, offset

    def skip(self, n_bytes: int) -> int:
        start, end = self.offset, self.offset + n_bytes
        if end > len(self.data):
            raise GGUFError(f"{self.path} is truncated: its header needs byte {end}, the file has {len(self.data)}")
        self.offset = end
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def count(self) -> int:
        count: int = self.scalar("<Q")
        if count > MAX_ENTRIES:
            raise GGUFError(f"{self.path}: {count} entries in the header; at most {MAX_ENTRIES} make sense")
        return count

    def string(self) -> bytes:
        start = self.skip(self.scalar("<Q"))
        return self.data[start : self.offset]

    def text(self) -> str:
        raw = self.string()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{self.path}: the name {raw[:40]!r} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string().decode("utf-8", errors="replace")
        if kind == ARRAY:
            return self.array()
        raise GGUFError(f"{self.path}: unknown value type {kind}")

    def array(self) -> Array:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        found = Array(kind, count, self.offset)
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self.skip_strings(count)
        else:
            raise GGUFError(f"{self.path}: an array of value type {kind} makes no sense")
        return found

    def skip_strings(self, count: int) -> None:
        """Walk over string lengths; the inner loop of opening a model, hence without method calls."""
        data, offset, end = self.data, self.offset, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        if count > (end - offset) // 8:
            raise GGUFError(f"{self.path} is truncated: {count} strings do not fit into its {end} bytes")
        for _ in range(count):
            if offset + 8 > end:
                break
            offset += 8 + length_at(data, offset)[0]
        self.skip(offset - self.offset if offset <= end else end + 1)

    def strings(self, count: int) -> list[bytes]:
        """Strings that were walked over before; tight for the same reason."""
        data, offset, found = self.data, self.offset, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = offset + 8
            offset = start + length_at(data, offset)[0]
            found.append(data[start:offset])
        return found

    def tensor(self) -> Tensor:
        name, n_dims = self.text(), self.scalar("<I")
        if not 0 < len(name.encode()) < MAX_NAME_BYTES:
            raise GGUFError(
                f"{self.path}: a tensor name of {len(name)} characters; 1 to {MAX_NAME_BYTES - 1} bytes fit"
            )
        if not 1 <= n_dims <= 4:
            raise GGUFError(f"{self.path}: tensor {name} has {n_dims} dimensions; 1 to 4 are possible")
        shape = tuple(self.scalar("<Q") for _ in range(n_dims))
        number, offset = self.scalar("<I"), self.scalar("<Q")
        try:
            qtype = GGMLQuantizationType(number)
        except ValueError:
            raise GGUFError(f"{self.path}: tensor {name} has the unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        n_values = math.prod(shape)
        if 0 in shape or n_values >= 1 << 60 or shape[0] % block:
            raise GGUFError(f"{self.path}: tensor {name} cannot be {shape} of {qtype.name}")
        return Tensor(name, shape, qtype.name, offset, n_values // block * block_bytes)
