"""A weight file that stays on its hub: headers by range requests, bytes straight from the wire.

Nothing of it touches the disk. It is verified as it passes: the pipeline hashes every byte and
compares the whole with the hub's sha256; a file without one is not taken.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from convert.fetch import fetch, is_weights
from convert.shard import Shard
from convert.wire import Patience, Place, read
from engine.errors import FetchError
from engine.registry import Model

BLOCK_BYTES = 1 << 16  # a request: what a zip's scattered headers need, not more


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """One weight file on the hubs; places() begins anew at the preferred one."""

    name: str
    n_bytes: int
    sha256: str
    places: Callable[[], Iterator[Place]] = field(compare=False)
    patience: Patience | None = field(default=None, compare=False)

    @property
    def identity(self) -> tuple[str, ...]:
        return (self.name, str(self.n_bytes), self.sha256)

    def open(self) -> BinaryIO:
        """For random access; FetchError where no hub answers to ranges."""
        return _Ranges(self)  # type: ignore[return-value]

    @contextlib.contextmanager
    def stream(self, position: int) -> Iterator[BinaryIO]:
        """From a position on; the hash tells whether the file was changed meanwhile."""
        chunks = read(self.name, self.n_bytes, self.places(), start=position, patience=self.patience)
        try:
            yield _Forward(self.name, chunks)  # type: ignore[misc]
        finally:
            chunks.close()  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return self.name


def remote_shards(
    spec: Model, folder: Path, sources: Sequence[str], *, patience: Patience | None = None, on_progress: Any = None
) -> dict[str, Shard]:
    """The weight files of a model as shards on a hub, by name; config, index and tokenizer are fetched.

    Raises as fetch() does; FetchError for a weight file whose hash nobody knows.
    """
    records, mirrors = fetch(spec, folder, sources, weights=False, patience=patience, on_progress=on_progress)
    shards: dict[str, Shard] = {}
    for record in records.values():
        if is_weights(record.name):
            if record.sha256 is None:
                raise FetchError(
                    f"{record.name}: no hub says its sha256, so it cannot be verified: fetch it without --stream"
                )
            places = functools.partial(mirrors.places, record)
            shards[record.name] = RemoteShard(record.name, record.n_bytes, record.sha256, places, patience)
    return shards


class _Forward(io.RawIOBase):
    """Chunks as a file that can only be read on."""

    def __init__(self, name: str, chunks: Iterator[bytes]) -> None:
        self.name, self._chunks, self._rest = name, chunks, memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes] = self._rest[:n_bytes]
        self._rest = self._rest[n_bytes:]
        return n_bytes


class _Ranges(io.RawIOBase):
    """A remote file for seeking and reading; the last block read is kept."""

    def __init__(self, shard: RemoteShard) -> None:
        self._shard, self._position = shard, 0
        self._block, self._block_start = b"", 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.n_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} lies before the file")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._shard.n_bytes if size < 0 else min(self._position + size, self._shard.n_bytes)
        data = self._range(self._position, end) if end > self._position else b""
        self._position += len(data)
        return data

    def _range(self, start: int, end: int) -> bytes:
        if not self._block_start <= start <= end <= self._block_start + len(self._block):
            stop = min(max(end, start + BLOCK_BYTES), self._shard.n_bytes)
            shard = self._shard
            chunks = read(shard.name, shard.n_bytes, shard.places(), start=start, stop=stop, patience=shard.patience)
            self._block, self._block_start = b"".join(chunks), start
            if len(self._block) != stop - start:
                raise FetchError(f"{shard.name}: {len(self._block)} of {stop - start} bytes received: run again")
        return self._block[start - self._block_start : end - self._block_start]
