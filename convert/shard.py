"""A weight file as the converter sees it: a header to look into, and bytes to read forward once."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from engine.errors import CheckpointError

KEPT_BYTES = 32 << 20


class Shard(Protocol):
    """One weight file, on disk or on a hub; two are equal when they are the same file."""

    @property
    def name(self) -> str:
        """Its file name."""

    @property
    def n_bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str | None:
        """The hash that it must have, as hex; None where nobody said."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells this file from another version of it."""

    def open(self) -> BinaryIO:
        """The file for random access: for its header."""

    def stream(self, position: int) -> AbstractContextManager[BinaryIO]:
        """The file from a position on; leaving checks that it did not change meanwhile."""


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A weight file on disk; sha256 where a fetch recorded one."""

    path: Path
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def identity(self) -> tuple[str, ...]:
        found = self.path.stat()
        return (self.name, str(found.st_size), str(found.st_mtime_ns))

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    @contextlib.contextmanager
    def stream(self, position: int) -> Iterator[BinaryIO]:
        with self.path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            file.seek(position)
            yield _Passing(file)  # type: ignore[misc]
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{self.path} was changed while it was read: wait until it is complete")

    def __str__(self) -> str:
        return str(self.path)


class _Passing(io.RawIOBase):
    """A file that is read forward once and leaves nothing in the page cache.

    15 GB that nobody reads again would push out what else this machine has cached, and finding so many
    fresh pages costs more than reading them.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.name, self._dropped = file, file.name, file.tell()

    def readinto(self, buffer: Any) -> int:
        n_bytes = self._file.readinto(buffer)
        position = self._file.tell()
        if position - self._dropped >= KEPT_BYTES:
            drop_cached(self._file.fileno(), self._dropped, position - self._dropped)
            self._dropped = position
        return n_bytes


def drop_cached(fd: int, offset: int = 0, n_bytes: int = 0) -> None:
    """Let go of the page cache of a part of a file, n_bytes 0 to its end; what is not synced stays."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
