"""Reading a finished file back from the disk: does it hold what was written, and what are its hashes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from convert.gguf_file import Slot
from convert.shard import drop_cached
from engine.errors import OutputError

CHUNK_BYTES = 1 << 20
Pieces = Mapping[str, Sequence[tuple[int, str]]]  # tensor -> (size, sha256) of each piece in order


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Hashes of a file and of its tensors by name: sha256 as hex."""

    n_bytes: int
    sha256: str
    tensors: Mapping[str, str]


def read_back(fd: int, slots: Sequence[Slot], data_offset: int, pieces: Pieces) -> ReadBack:
    """Hash a file, every tensor of it, and compare each piece with what was written.

    The page cache is dropped first, so that the disk is read and not the memory that was written from.
    Raises OutputError naming the first tensor that reads back otherwise.
    """
    n_bytes = os.fstat(fd).st_size
    drop_cached(fd)
    whole: list[str] = []
    failures: list[BaseException] = []
    thread = threading.Thread(target=_hash_whole, args=(fd, n_bytes, whole, failures))
    thread.start()
    buffer = bytearray(CHUNK_BYTES)
    try:
        tensors = {slot.name: _hash_tensor(fd, slot, data_offset, pieces.get(slot.name, ()), buffer) for slot in slots}
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return ReadBack(n_bytes, whole[0], tensors)


def _hash_whole(fd: int, n_bytes: int, whole: list[str], failures: list[BaseException]) -> None:
    try:
        digest = hashlib.sha256()
        for chunk in _chunks(fd, 0, n_bytes, bytearray(CHUNK_BYTES)):
            digest.update(chunk)
        whole.append(digest.hexdigest())
    except BaseException as error:
        failures.append(error)


def _hash_tensor(fd: int, slot: Slot, data_offset: int, pieces: Sequence[tuple[int, str]], buffer: bytearray) -> str:
    digest, offset = hashlib.sha256(), data_offset + slot.offset
    if sum(n_bytes for n_bytes, _ in pieces) != slot.n_bytes:
        raise OutputError(f"tensor {slot.name} was not written whole: run again")
    for n_bytes, expected in pieces:
        piece = hashlib.sha256()
        for chunk in _chunks(fd, offset, n_bytes, buffer):
            piece.update(chunk)
            digest.update(chunk)
        if piece.hexdigest() != expected:
            raise OutputError(f"tensor {slot.name} reads back other than it was written: check the disk, run again")
        offset += n_bytes
    return digest.hexdigest()


def _chunks(fd: int, offset: int, n_bytes: int, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of a part of a file in pieces; each is overwritten by the next."""
    end, view = offset + n_bytes, memoryview(buffer)
    while offset < end:
        n_read = os.preadv(fd, [view[: end - offset]], offset)
        if not n_read:
            raise OutputError(f"the output ends {end - offset} bytes early: check the disk, run again")
        yield view[:n_read]
        offset += n_read
