"""What is finished of an output that is not published yet, so that the next run goes on from there.

    CRC32 {"plan": FINGERPRINT}                       first line: of which conversion
    CRC32 {"tensor": NAME, "pieces": [...], ...}      a tensor whose bytes are on the disk
    CRC32 {"verified": {...}}                         the whole file was read back; the sidecar's content

A line that a crash cut short, or that anything changed, fails its checksum: it and all after it
are void. Lines are written after the data that they speak of has been synced.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import OutputError


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a shard was read: sha256 of its bytes up to a position; state continues that hash (digest.py)."""

    shard: str
    position: int
    sha256: str
    state: str | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor that is written and synced; pieces are (size in bytes, sha256 as hex) in order."""

    tensor: str
    pieces: tuple[tuple[int, str], ...]
    mark: Mark


class Journal:
    """The journal of one output; only the holder of the output's lock may open it."""

    def __init__(self, path: Path, fingerprint: str | None) -> None:
        self.path, self._fingerprint = path, fingerprint
        self.finished: dict[str, Finished] = {}
        self._fd = -1
        self._lock = threading.RLock()  # tensors finish in one thread while another finds their source wrong
        self._is_sealed = False
        if fingerprint is not None:
            self._load(fingerprint)

    def _load(self, fingerprint: str) -> None:
        records, n_valid = read_records(self.path)
        if records and records[0] == {"plan": fingerprint}:
            found = [_finished(record) for record in records[1:] if "tensor" in record]
            self.finished = {item.tensor: item for item in found}
            self._fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW)
            os.ftruncate(self._fd, n_valid)
            os.lseek(self._fd, 0, os.SEEK_END)

    def restart(self) -> None:
        """Forget everything: nothing is finished."""
        with self._lock:
            self.finished = {}
            self.close()
            if self._fingerprint is not None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
                self._append([{"plan": self._fingerprint}])

    def forget(self) -> None:
        """Nothing is finished, and nothing that this run still says is taken down."""
        with self._lock:
            self.restart()
            self._is_sealed = True

    def add(self, items: Iterable[Finished]) -> None:
        """Say that tensors are finished; their bytes must be on the disk already."""
        items = list(items)
        with self._lock:
            if self._is_sealed:
                return
            self._append([asdict(item) for item in items])
            self.finished |= {item.tensor: item for item in items}

    def verified(self, content: Mapping[str, Any]) -> None:
        """Say that the whole file was read back and what its sidecar holds."""
        self._append([{"verified": content}])

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        if self._fd < 0:
            return
        data = b"".join(_line(record) for record in records)
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; what it says stays."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def remove(self) -> None:
        """Delete it: there is nothing to go on with."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The valid lines from the start of a journal, and how many bytes they are; none where it is absent."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error
    records, n_valid = [], 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or line[8:9] != b" " or _checksum(line[9:-1]) != line[:8]:
            break
        records.append(json.loads(line[9:]))
        n_valid += len(line)
    return records, n_valid


def _finished(record: Mapping[str, Any]) -> Finished:
    pieces = tuple((int(n_bytes), str(sha256)) for n_bytes, sha256 in record["pieces"])
    return Finished(record["tensor"], pieces, Mark(**record["mark"]))


def _line(record: Mapping[str, Any]) -> bytes:
    data = json.dumps(record, separators=(",", ":")).encode("utf-8")
    return _checksum(data) + b" " + data + b"\n"


def _checksum(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode("ascii")
