"""One GGUF file, written in any order under a temporary name and published whole or not at all.

    .NAME.part      locked; tensors at their places, then the header
    .NAME.journal   which tensors are finished (journal.py): the next run goes on from there
    NAME            once everything was synced and read back
    NAME.json       the sidecar (sidecar.py)

The size of the whole file is known before the first tensor is read: a disk that is too small is
refused at the start. Whatever is interrupted, and however, NAME is never anything but whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_file import Entry, Slot, header_bytes, padded
from convert.journal import Finished, Journal, read_records
from convert.readback import ReadBack, read_back
from convert.shard import drop_cached
from convert.sidecar import sha256_of, sidecar_path, sync_folder, write_sidecar
from engine.errors import CheckpointError, DoesNotFit, FourbitError, OutputError
from engine.gguf_header import read_header
from engine.host import disk_free_bytes

SPARE_DISK_BYTES = 64 << 20
Describe = Callable[[ReadBack], Mapping[str, Any]]


class OutputFile:
    """An unpublished file: threads write() slices of tensors, publish() makes it the real one."""

    def __init__(self, fd: int, final: Path, slots: Sequence[Slot], data_offset: int, journal: Journal) -> None:
        self._fd, self._final, self._journal = fd, final, journal
        self._slots, self._data_offset = tuple(slots), data_offset

    @property
    def finished(self) -> Mapping[str, Finished]:
        """Tensors that this or an earlier run finished, by name."""
        return self._journal.finished

    def write(self, slot: Slot, offset: int, data: np.ndarray | bytes | memoryview) -> None:
        """Write bytes of one tensor, offset from the tensor's start; safe from several threads."""
        view = memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")
        if offset < 0 or offset + len(view) > slot.n_bytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit {slot.name}, {slot.n_bytes} bytes")
        self._write_at(self._data_offset + slot.offset + offset, view)

    def finish(self, items: Sequence[Finished]) -> None:
        """Sync what was written, then put on record that these tensors are whole."""
        os.fdatasync(self._fd)
        drop_cached(self._fd)  # read back from the disk later, if at all
        self._journal.add(items)

    def forget(self) -> None:
        """Take nothing that was finished for granted: its source proved to be wrong."""
        self._journal.forget()

    def publish(self, entries: Sequence[Entry], describe: Describe | None = None) -> int:
        """Write the header, make the file durable, read it back, give it its name; its size in bytes.

        describe: what the sidecar holds, from the hashes that were read back; without it there is none
        and only the header is read back.
        """
        header = header_bytes(entries, self._slots)
        if len(header) != self._data_offset:
            raise ValueError(f"the header has {len(header)} bytes, {self._data_offset} were planned")
        self._write_at(0, memoryview(header))
        os.fsync(self._fd)
        n_bytes = self._check_header()
        content = describe(self._read_back()) if describe else None
        if content is not None:
            self._journal.verified(content)
        sidecar_path(self._final).unlink(missing_ok=True)  # it may speak of a file that is about to go
        os.replace(part_path(self._final), self._final)
        sync_folder(self._final.parent)
        if content is not None:
            write_sidecar(self._final, content)
        self._journal.remove()
        return n_bytes

    def _read_back(self) -> ReadBack:
        pieces = {name: item.pieces for name, item in self.finished.items()}
        try:
            return read_back(self._fd, self._slots, self._data_offset, pieces)
        except OutputError:
            self._journal.restart()
            raise

    def _write_at(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def _check_header(self) -> int:
        header = read_header(part_path(self._final))
        found = [(t.name, t.shape, t.qtype, t.offset, t.n_bytes) for t in header.tensors]
        start = self._data_offset
        if found != [(s.name, s.shape, s.qtype, start + s.offset, s.n_bytes) for s in self._slots]:
            raise OutputError(f"{self._final}: the header reads back other than it was written: check the disk")
        return header.file_bytes


def part_path(path: Path) -> Path:
    """Where an output lies while it is written."""
    return path.with_name(f".{path.name}.part")


def journal_path(path: Path) -> Path:
    """Where the journal of an unpublished output lies."""
    return path.with_name(f".{path.name}.journal")


@contextlib.contextmanager
def create(
    path: Path, entries: Sequence[Entry], slots: Sequence[Slot], fingerprint: str | None = None
) -> Iterator[OutputFile]:
    """An unpublished file at its full size, with what an earlier run of the same fingerprint finished.

    The entries given here and to publish() may differ in values, not in their size in bytes. What is
    finished outlasts an interruption (a signal, the network, the disk); anything else removes it.
    Raises OutputError where it cannot be written or another run writes it, DoesNotFit where the disk is too small.
    """
    data_offset = len(header_bytes(entries, slots))
    n_bytes = data_offset + max((s.offset + padded(s.n_bytes) for s in slots), default=0)
    with _lasting_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(path)
        stack.callback(os.close, fd)
        journal = Journal(journal_path(path), fingerprint)
        stack.callback(journal.close)
        try:
            if os.fstat(fd).st_size != n_bytes or not journal.finished:
                journal.restart()
            _reserve(fd, path, n_bytes)
            yield OutputFile(fd, path, slots, data_offset, journal)
        except BaseException as error:
            if not (journal.finished and _may_go_on(error)):
                _remove(path, fd, journal)
            raise


def settle(path: Path) -> None:
    """Write the sidecar of a published file, if the run that published it died before it could."""
    content = next((record["verified"] for record in read_records(journal_path(path))[0] if "verified" in record), None)
    if content is None or part_path(path).exists():
        return
    with _lasting_errors(path), path.open("rb") as file:
        _flock(file.fileno(), path)
        if sha256_of(path) == content["sha256"]:
            write_sidecar(path, content)
        journal_path(path).unlink(missing_ok=True)


def _may_go_on(error: BaseException) -> bool:
    """Whether the next run may use what is finished: not if the checkpoint itself is at fault."""
    return not isinstance(error, (CheckpointError, DoesNotFit)) and (
        isinstance(error, (FourbitError, OSError)) or not isinstance(error, Exception)
    )


@contextlib.contextmanager
def _lasting_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _lock(path: Path) -> int:
    """The part file, open and ours alone; a crash of its holder frees it."""
    part = part_path(path)
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _flock(fd, path)
            if os.path.samestat(os.fstat(fd), os.stat(part)):
                return fd
        except FileNotFoundError:
            pass  # published or removed between open and lock: that inode is no longer the part
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _flock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another run is writing {path}: wait for it or stop it, then run again") from None


def _reserve(fd: int, path: Path, n_bytes: int) -> None:
    """Take the disk now where the file system can, so that a full disk is found out before the work."""
    missing = n_bytes - os.fstat(fd).st_blocks * 512
    free = disk_free_bytes(path.parent)
    if free < missing + SPARE_DISK_BYTES:
        raise DoesNotFit(
            f"{path} needs {n_bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free: "
            "make room, or choose another place with --out"
        )
    os.ftruncate(fd, n_bytes)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, n_bytes)


def _remove(path: Path, fd: int, journal: Journal) -> None:
    """Delete the part, if it still is what the lock was taken on, and the journal with it."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.stat(part_path(path))):
            part_path(path).unlink()
            journal.remove()
