"""Shards in, blocks out, in bounded memory: one reader, several workers, a short queue between.

    reader    each shard from its first byte to its last, once, hashing it; tensors cut into slabs
    queue     at most one waiting slab a worker
    workers   check, widen, quantize, write in place; buffers of their own
    scribe    syncs the output and puts finished tensors on record, so that a later run can go on

At most 2 * n_threads + 1 slabs of source and as many slabs of float32 as threads exist at a time,
whatever the size of the checkpoint. Reading is strictly forward: the source may be a slow disk or
the network. A run that goes on takes up each shard after its last tensor that is finished together
with all before it, with the hash as it stood there.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from convert import digest as digests
from convert.blocks import quantize_rows, row_bytes
from convert.digest import Sha256
from convert.journal import Finished, Mark
from convert.output_file import OutputFile
from convert.plan import Item
from convert.shard import Shard
from convert.slabs import SLAB_BYTES, Span, check_finite, float_rows, is_copied, ordered, source_row_bytes, spans
from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is, in bytes of source tensors."""

    tensor: str
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]
Buffers = queue.SimpleQueue[np.ndarray]


@dataclass(frozen=True, slots=True)
class Slab:
    """Some whole rows of one tensor, as they are in the shard: raw is (n_bytes,) uint8."""

    item: Item
    span: Span
    raw: np.ndarray
    buffer: np.ndarray  # what raw is a part of: goes back when the slab is done


def run(
    shards: Sequence[Shard],
    items: Sequence[Item],
    output: OutputFile,
    n_threads: int,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Convert all items that are not finished; the sha256 of each shard, as hex, in their order.

    Raises what a thread raised first, after every one has ended. A shard that has another hash than
    it must have makes CheckpointError, and nothing finished so far is kept.
    """
    slabs: queue.Queue[Slab | None] = queue.Queue(maxsize=n_threads)
    buffers = _buffers(items, 2 * n_threads + 1)
    failures: list[BaseException] = []
    scribe = _Scribe(output, failures)
    tally = _Tally(items, output, scribe, on_progress)
    workers = [threading.Thread(target=_work, args=(slabs, buffers, output, tally, failures)) for _ in range(n_threads)]
    for thread in (scribe, *workers):
        thread.start()
    hashes: list[str] = []
    try:
        for shard in shards:
            of_shard = [item for item in items if item.tensor.shard == shard]
            for slab in _read_shard(shard, of_shard, buffers, output, tally, hashes):
                if failures:
                    break
                slabs.put(slab)
            if failures:
                break
    except BaseException as error:  # KeyboardInterrupt too: the workers must end before the file is closed
        failures.append(error)
    finally:
        for _ in workers:
            slabs.put(None)
        for worker in workers:
            worker.join()
        scribe.stop()
    if failures:
        raise failures[0]
    return hashes


@dataclass(slots=True)
class _Count:
    """What is still to come of one tensor."""

    n_slabs: int
    pieces: dict[int, tuple[int, str]] = field(default_factory=dict)
    mark: Mark | None = None


class _Tally:
    """Counts finished slabs across threads; tells the scribe of whole tensors, the user of bytes."""

    def __init__(
        self, items: Sequence[Item], output: OutputFile, scribe: _Scribe, on_progress: OnProgress | None
    ) -> None:
        self._lock, self._scribe, self._on_progress = threading.Lock(), scribe, on_progress
        self._total = sum(item.tensor.n_bytes for item in items)
        self._done = sum(item.tensor.n_bytes for item in items if item.slot.name in output.finished)
        self._counts = {item.slot.name: _Count(len(spans(item))) for item in items}

    def add(self, slab: Slab, piece: tuple[int, str]) -> None:
        """A slab is written."""
        with self._lock:
            name = slab.item.slot.name
            self._counts[name].pieces[slab.span.index] = piece
            self._done += slab.raw.nbytes
            if self._on_progress:
                self._on_progress(Progress(name, self._done, self._total))
            self._tell(name)

    def mark(self, item: Item, mark: Mark) -> None:
        """A tensor is read to its end, and this is how the shard's hash stands there."""
        with self._lock:
            self._counts[item.slot.name].mark = mark
            self._tell(item.slot.name)

    def _tell(self, name: str) -> None:
        count = self._counts[name]
        if count.mark and len(count.pieces) == count.n_slabs:
            pieces = tuple(count.pieces[index] for index in range(count.n_slabs))
            self._scribe.put(Finished(name, pieces, count.mark))


class _Scribe(threading.Thread):
    """Puts finished tensors on record, as many at a time as have come together."""

    def __init__(self, output: OutputFile, failures: list[BaseException]) -> None:
        super().__init__()
        self._queue: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()
        self._output, self._failures = output, failures

    def put(self, item: Finished) -> None:
        self._queue.put(item)

    def stop(self) -> None:
        """End after what is waiting; whatever failed, tensors that are whole stay on record."""
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        is_last = False
        while not is_last:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            is_last = None in batch
            items = [item for item in batch if item is not None]
            try:
                if items:
                    self._output.finish(items)
            except BaseException as error:
                self._failures.append(error)


def _work(
    slabs: queue.Queue[Slab | None],
    buffers: Buffers,
    output: OutputFile,
    tally: _Tally,
    failures: list[BaseException],
) -> None:
    """Convert slabs until the end mark; after a failure anywhere, only empty the queue."""
    floats, blocks = np.empty(0, np.float32), np.empty(0, np.uint8)
    while (slab := slabs.get()) is not None:
        try:
            if failures:
                continue
            n_values = (slab.span.n_rows + slab.span.n_zero) * slab.item.slot.shape[0]
            if floats.size < n_values:
                floats, blocks = np.empty(n_values, np.float32), np.empty(4 * n_values, np.uint8)
            tally.add(slab, _convert(slab, floats, blocks, output))
        except BaseException as error:
            failures.append(error)
        finally:
            buffers.put(slab.buffer)


def _buffers(items: Sequence[Item], count: int) -> Buffers:
    """Memory for slabs, used again and again: fresh pages would cost the kernel as much as the reading."""
    largest = max((span.n_rows * source_row_bytes(item) for item in items for span in spans(item)), default=0)
    buffers: Buffers = queue.SimpleQueue()
    for _ in range(count):
        buffers.put(np.empty(max(largest, SLAB_BYTES), np.uint8))
    return buffers


def _convert(slab: Slab, floats: np.ndarray, blocks: np.ndarray, output: OutputFile) -> tuple[int, str]:
    """Write one slab; size and sha256 of what was written."""
    item, span = slab.item, slab.span
    bytes_per_row = row_bytes(item.slot.qtype, item.slot.shape[0])
    check_finite(item, span, slab.raw)
    out = blocks[: (span.n_rows + span.n_zero) * bytes_per_row]
    if is_copied(item):
        out[:] = ordered(item, slab.raw)
    else:
        quantize_rows(item.slot.qtype, float_rows(item, span, slab.raw, floats), out)
    output.write(item.slot, span.out_first * bytes_per_row, out)
    return out.nbytes, hashlib.sha256(out.data).hexdigest()


def _read_shard(
    shard: Shard, items: Sequence[Item], buffers: Buffers, output: OutputFile, tally: _Tally, hashes: list[str]
) -> Iterator[Slab]:
    """The unfinished slabs of one shard in the order of its bytes; appends the shard's sha256 at the end."""
    items = sorted(items, key=lambda item: item.tensor.offset)
    position, digest = _resume(items, output)
    n_bytes = shard.n_bytes
    with shard.stream(position) as file:
        for item in items:
            end = item.tensor.offset + item.tensor.n_bytes
            if end <= position:
                continue
            if item.tensor.offset < position or end > n_bytes:
                raise CheckpointError(
                    f"{shard}: tensor {item.tensor.name} is not where its header says: fetch it again"
                )
            _skip(file, item.tensor.offset - position, digest)
            finished = output.finished.get(item.slot.name)
            if finished is None:
                yield from _read_tensor(file, item, buffers, digest)
                tally.mark(item, Mark(shard.name, end, digest.hexdigest(), digest.save()))
            else:
                _skip(file, item.tensor.n_bytes, digest)
                _check_mark(shard, finished.mark, digest, output)
            position = end
        _skip(file, n_bytes - position, digest)
    found = digest.hexdigest()
    if shard.sha256 is not None and found != shard.sha256:
        output.forget()
        raise CheckpointError(f"{shard} has sha256 {found}, it must be {shard.sha256}: fetch it again")
    hashes.append(found)


def _resume(items: Sequence[Item], output: OutputFile) -> tuple[int, Sha256]:
    """Where to begin in a shard, and the hash of what lies before."""
    last: Mark | None = None
    for item in items:
        finished = output.finished.get(item.slot.name)
        if finished is None:
            break
        last = finished.mark
    if last and last.state and (digest := digests.restore(last.state, last.sha256)):
        return last.position, digest
    return 0, Sha256()


def _check_mark(shard: Shard, mark: Mark, digest: Sha256, output: OutputFile) -> None:
    if digest.hexdigest() != mark.sha256:
        output.forget()
        raise CheckpointError(f"{shard} is not what it was when the last run read it: run again to begin anew")


def _read_tensor(file: BinaryIO, item: Item, buffers: Buffers, digest: Sha256) -> Iterator[Slab]:
    row = source_row_bytes(item)
    for span in spans(item):
        buffer = buffers.get()
        raw = buffer[: span.n_rows * row]
        _read(file, raw, digest)
        yield Slab(item, span, raw, buffer)


def _skip(file: BinaryIO, n_bytes: int, digest: Sha256) -> None:
    buffer = np.empty(min(n_bytes, SLAB_BYTES), np.uint8)
    while n_bytes > 0:
        part = buffer[:n_bytes]
        _read(file, part, digest)
        n_bytes -= part.nbytes


def _read(file: BinaryIO, buffer: np.ndarray, digest: Sha256) -> None:
    """Fill the buffer from the file, and hash it."""
    view = memoryview(buffer.data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{getattr(file, 'name', 'a shard')} ended {len(view)} bytes early: fetch it again")
        view = view[got:]
    digest.update(buffer)
