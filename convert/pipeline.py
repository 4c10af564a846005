"""Shards in, blocks out, in bounded memory: one reader, several workers, a short queue between.

    reader    each shard from its first byte to its last, once, hashing it; tensors cut into slabs
    queue     at most one waiting slab a worker
    workers   check, widen, quantize, write in place; buffers of their own

At most 2 * n_threads + 1 slabs of source and as many slabs of float32 as threads exist at a time,
whatever the size of the checkpoint. Reading strictly forward means that the source may as well be
a disk that is slow to seek.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.blocks import SOURCE_BYTES, first_non_finite, quantize_rows, row_bytes, widen
from convert.gguf_file import GGUFFile
from convert.plan import Item
from engine.errors import CheckpointError

SLAB_BYTES = 8 << 20  # of source: 16 MiB as float32


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, in bytes of source tensors."""

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Slab:
    """Some whole rows of one tensor, as they are in the shard: raw is (n_bytes,) uint8."""

    item: Item
    first_row: int
    n_rows: int
    raw: np.ndarray


def run(
    shards: Sequence[Path],
    items: Sequence[Item],
    output: GGUFFile,
    n_threads: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[str]:
    """Convert all items into the output; the sha256 of each shard, as hex, in their order.

    Raises what a worker or the reader raised first, after every thread has ended.
    """
    slabs: queue.Queue[Slab | None] = queue.Queue(maxsize=n_threads)
    failures: list[BaseException] = []
    tally = _Tally(sum(item.tensor.n_bytes for item in items), on_progress)
    workers = [threading.Thread(target=_work, args=(slabs, output, tally, failures)) for _ in range(n_threads)]
    for worker in workers:
        worker.start()
    hashes: list[str] = []
    try:
        for shard in shards:
            for slab in _read_shard(shard, [i for i in items if i.tensor.shard == shard], hashes):
                if failures:
                    break
                slabs.put(slab)
    except BaseException as error:  # KeyboardInterrupt too: the workers must end before the file is closed
        failures.append(error)
    finally:
        for _ in workers:
            slabs.put(None)
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]
    return hashes


class _Tally:
    """Counts finished bytes across threads and passes them on."""

    def __init__(self, total_bytes: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._lock, self._done, self._total, self._on_progress = threading.Lock(), 0, total_bytes, on_progress

    def add(self, slab: Slab) -> None:
        with self._lock:
            self._done += slab.raw.nbytes
            if self._on_progress:
                self._on_progress(Progress(slab.item.slot.name, self._done, self._total))


def _work(slabs: queue.Queue[Slab | None], output: GGUFFile, tally: _Tally, failures: list[BaseException]) -> None:
    """Convert slabs until the end mark; after a failure anywhere, only empty the queue."""
    floats, blocks = np.empty(0, np.float32), np.empty(0, np.uint8)
    while (slab := slabs.get()) is not None:
        if failures:
            continue
        try:
            n_values = slab.raw.nbytes // SOURCE_BYTES[slab.item.tensor.dtype]
            if floats.size < n_values:
                floats, blocks = np.empty(n_values, np.float32), np.empty(4 * n_values, np.uint8)
            _convert(slab, floats[:n_values], blocks, output)
            tally.add(slab)
        except BaseException as error:
            failures.append(error)


def _convert(slab: Slab, floats: np.ndarray, blocks: np.ndarray, output: GGUFFile) -> None:
    item, n_per_row = slab.item, slab.item.slot.shape[0]
    dtype, bytes_per_row = item.tensor.dtype, row_bytes(item.slot.qtype, n_per_row)
    bad = first_non_finite(dtype, slab.raw)
    if bad is not None:
        place = slab.first_row * n_per_row + bad
        raise CheckpointError(
            f"tensor {item.tensor.name} in {item.tensor.shard.name}: value {place} is not a finite number; "
            "the checkpoint is damaged: fetch it again"
        )
    raw = slab.raw if item.rope_head_dim is None else _interleave(slab, item.rope_head_dim)
    out = blocks[: slab.n_rows * bytes_per_row]
    if dtype == item.slot.qtype:
        out[:] = raw
    else:
        rows = floats.reshape(slab.n_rows, n_per_row)
        widen(dtype, raw, rows)
        quantize_rows(item.slot.qtype, rows, out)
    output.write(item.slot, slab.first_row * bytes_per_row, out)


def _interleave(slab: Slab, head_dim: int) -> np.ndarray:
    """Rows of each head from half-split to interleaved rotary order, as llama.cpp's `llama` wants q and k.

    Source: llama.cpp, conversion/llama.py: permute.
    """
    heads = slab.raw.reshape(slab.n_rows // head_dim, 2, head_dim // 2, -1)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1)


def _read_shard(shard: Path, items: Sequence[Item], hashes: list[str]) -> Iterator[Slab]:
    """The slabs of one shard in the order of its bytes; appends the shard's sha256 at the end."""
    digest = hashlib.sha256()
    with shard.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        position = 0
        for item in sorted(items, key=lambda item: item.tensor.offset):
            if item.tensor.offset < position:
                raise CheckpointError(f"{shard}: tensor {item.tensor.name} shares bytes with another")
            _skip(file, item.tensor.offset - position, digest)
            yield from _read_tensor(file, item, digest)
            position = item.tensor.offset + item.tensor.n_bytes
        _skip(file, before.st_size - position, digest)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{shard} was changed while it was read: wait until it is complete")
    hashes.append(digest.hexdigest())


def _read_tensor(file: BinaryIO, item: Item, digest: hashlib._Hash) -> Iterator[Slab]:
    n_per_row = item.slot.shape[0]
    row = n_per_row * SOURCE_BYTES[item.tensor.dtype]
    n_rows, step = item.tensor.n_bytes // row, max(1, SLAB_BYTES // row)
    if item.rope_head_dim:
        step = max(item.rope_head_dim, step // item.rope_head_dim * item.rope_head_dim)
    for first in range(0, n_rows, step):
        count = min(step, n_rows - first)
        yield Slab(item, first, count, _read(file, count * row, digest))


def _skip(file: BinaryIO, n_bytes: int, digest: hashlib._Hash) -> None:
    while n_bytes > 0:
        n_bytes -= _read(file, min(n_bytes, SLAB_BYTES), digest).nbytes


def _read(file: BinaryIO, n_bytes: int, digest: hashlib._Hash) -> np.ndarray:
    """Exactly n_bytes from the file into a buffer of that size, hashed."""
    buffer = np.empty(n_bytes, np.uint8)
    view = memoryview(buffer.data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{file.name} ended {len(view)} bytes early: fetch it again")
        view = view[got:]
    digest.update(buffer.data)
    return buffer
