"""Reading a finished file back from the disk: does it hold what was written, and what are its hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from convert.gguf_file import Slot
from convert.shard import KEPT_BYTES, drop_cached
from engine.errors import OutputError

LARGEST_GAP = 1 << 20  # of what is read at once between tensors: the header
Pieces = Mapping[str, Sequence[tuple[int, str]]]  # tensor -> (size, sha256) of each piece in order


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Hashes of a file and of its tensors by name: sha256 as hex."""

    n_bytes: int
    sha256: str
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file that are read at once: a piece of a tensor, or what lies between tensors."""

    tensor: str | None
    offset: int
    n_bytes: int
    sha256: str | None


def read_back(fd: int, slots: Sequence[Slot], data_offset: int, pieces: Pieces) -> ReadBack:
    """Hash a file, every tensor of it, and compare each piece with what was written.

    The page cache is dropped first, so that the disk is read and not the memory that was written from.
    Two threads hash each part while the next is read. OutputError names the first tensor that differs.
    """
    drop_cached(fd)
    n_bytes = os.fstat(fd).st_size
    parts = list(_parts(slots, data_offset, pieces, n_bytes))
    buffers = [bytearray(max((part.n_bytes for part in parts), default=1)) for _ in range(2)]
    whole, tensors = hashlib.sha256(), {slot.name: hashlib.sha256() for slot in slots}
    pending: list[Future[None]] = []
    n_kept = 0
    with ThreadPoolExecutor(2) as pool:
        for number, part in enumerate(parts):
            view = memoryview(buffers[number % 2])[: part.n_bytes]
            _read(fd, part.offset, view)
            for future in pending:
                future.result()
            pending = [pool.submit(whole.update, view)]
            if part.tensor is not None:
                pending.append(pool.submit(_check, part, view, tensors[part.tensor]))
            n_kept += part.n_bytes
            if n_kept >= KEPT_BYTES:
                drop_cached(fd, part.offset + part.n_bytes - n_kept, n_kept)
                n_kept = 0
        for future in pending:
            future.result()
    return ReadBack(n_bytes, whole.hexdigest(), {name: digest.hexdigest() for name, digest in tensors.items()})


def _parts(slots: Sequence[Slot], data_offset: int, pieces: Pieces, n_bytes: int) -> Iterator[Part]:
    """The whole file in the order of its bytes."""
    position = 0
    for slot in sorted(slots, key=lambda slot: slot.offset):
        found = pieces.get(slot.name, ())
        if sum(size for size, _ in found) != slot.n_bytes:
            raise OutputError(f"tensor {slot.name} was not written whole: run again")
        yield from _gap(position, data_offset + slot.offset)
        position = data_offset + slot.offset
        for size, sha256 in found:
            yield Part(slot.name, position, size, sha256)
            position += size
    yield from _gap(position, n_bytes)


def _gap(start: int, end: int) -> Iterator[Part]:
    for offset in range(start, end, LARGEST_GAP):
        yield Part(None, offset, min(LARGEST_GAP, end - offset), None)


def _check(part: Part, view: memoryview, tensor: hashlib._Hash) -> None:
    if hashlib.sha256(view).hexdigest() != part.sha256:
        raise OutputError(f"tensor {part.tensor} reads back other than it was written: check the disk, run again")
    tensor.update(view)


def _read(fd: int, offset: int, view: memoryview) -> None:
    while view:
        n_read = os.preadv(fd, [view], offset)
        if not n_read:
            raise OutputError(f"the output ends {len(view)} bytes early: check the disk, run again")
        view, offset = view[n_read:], offset + n_read
