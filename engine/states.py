"""KV caches on disk: a system prompt that is evaluated once, a chat that goes on tomorrow.

    b"4BITSTAT" | header length u32 | header JSON | ids int32[n_ids] | llama.cpp's state | sha256 of all before

llama.cpp's own parser asserts, so nothing is given to it that is not byte for byte what it wrote:
the checksum covers the whole file, and the header must name this model file, this llama.cpp, this
cache type and these sizes. Anything else is refused and the prompt is evaluated instead.
Files are written whole or not at all; beyond a cap the longest unused go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import StateError
from engine.home import home

MAGIC = b"4BITSTAT"
VERSION = 1
PREFIX = struct.Struct("<8sI")
MAX_HEADER_BYTES = 16 << 20
DIGEST_BYTES = 32
CAP_BYTES = 4 << 30
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """What a state belongs to: it means nothing anywhere else."""

    model_sha256: str
    llama_cpp: str
    kv_qtype: str
    flash_attention: str
    n_vocab: int


@dataclass(frozen=True, slots=True)
class State:
    """Ids, what llama.cpp made of them (n_bytes,) uint8, and the messages of a chat."""

    ids: list[int]
    data: np.ndarray
    messages: tuple[dict[str, str], ...] = ()


def states_folder() -> Path:
    """Where states lie unless told otherwise."""
    return home() / "states"


def state_name(origin: Origin, ids: Sequence[int]) -> str:
    """The file name of the state of these ids: the same prompt of the same model finds it."""
    key = hashlib.sha256(json.dumps(asdict(origin)).encode() + np.asarray(ids, "<i4").tobytes())
    return f"prefix-{key.hexdigest()[:32]}.state"


def save(path: Path, origin: Origin, state: State, cap_bytes: int = CAP_BYTES) -> None:
    """Write a state whole or not at all, then make room; StateError where it cannot be written."""
    header = json.dumps(
        asdict(origin)
        | {"version": VERSION, "n_ids": len(state.ids), "n_bytes": state.data.nbytes, "messages": state.messages}
    ).encode("utf-8")
    ids = np.asarray(state.ids, "<i4").tobytes()
    parts: list[bytes | memoryview] = [PREFIX.pack(MAGIC, len(header)), header, ids, state.data.data]
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            try:
                for part in parts:
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        _make_room(path, cap_bytes)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}: nothing else is affected") from error


def load(path: Path, origin: Origin) -> State:
    """Read a state; StateError says why it is not one for this model and these settings.

    The file is read once, and what was hashed is what llama.cpp is given.
    """
    try:
        raw = np.fromfile(path, np.uint8)
        n_header = _check_prefix(path, raw)
        header = json.loads(raw[PREFIX.size : PREFIX.size + n_header].tobytes())
        start = PREFIX.size + n_header
        _check_header(path, header, origin, raw.nbytes - start - DIGEST_BYTES)
        if hashlib.sha256(raw[:-DIGEST_BYTES].data).digest() != raw[-DIGEST_BYTES:].tobytes():
            raise ValueError("its checksum is wrong")
        os.utime(path)  # used just now: the last to be thrown out
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise StateError(f"{path} is damaged: {error}") from error
    ids = np.frombuffer(raw[start : start + 4 * header["n_ids"]].tobytes(), "<i4").tolist()
    return State(ids, raw[start + 4 * header["n_ids"] : -DIGEST_BYTES], tuple(header["messages"]))


def _check_prefix(path: Path, raw: np.ndarray) -> int:
    """The length of the header, which lies within the file."""
    if raw.nbytes < PREFIX.size + DIGEST_BYTES:
        raise StateError(f"{path} is no saved state: it has {raw.nbytes} bytes")
    magic, n_header = PREFIX.unpack(raw[: PREFIX.size].tobytes())
    if magic != MAGIC or n_header > min(MAX_HEADER_BYTES, raw.nbytes - PREFIX.size - DIGEST_BYTES):
        raise StateError(f"{path} is no saved state")
    return int(n_header)


def _check_header(path: Path, header: Any, origin: Origin, n_rest: int) -> None:
    wanted = asdict(origin) | {"version": VERSION}
    for name, value in wanted.items():
        if header[name] != value:
            found = str(header[name])[:40]
            raise StateError(f"{path} is of another {name.replace('_', ' ')}: {found!r}, not {str(value)[:40]!r}")
    if type(header["n_ids"]) is not int or header["n_ids"] < 1 or 4 * header["n_ids"] + header["n_bytes"] != n_rest:
        raise ValueError(f"{header['n_ids']} ids and {header['n_bytes']} bytes do not make {n_rest}")


def _make_room(newest: Path, cap_bytes: int) -> None:
    """Delete the states that were not used for longest, until all together are below the cap."""
    found = sorted(newest.parent.glob("*.state"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in found)
    for path in found:
        if total <= cap_bytes or path == newest:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


def model_sha256(path: Path) -> str:
    """The sha256 of a model file, computed once: kept by path, size and times of change."""
    found = path.stat()
    record = states_folder() / "models.json"
    key = f"{path.resolve()}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"
    known = _read_record(record)
    if key not in known:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        known[key] = digest.hexdigest()
        _write_record(record, known)
    return known[key]


def _read_record(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_record(path: Path, known: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # a cache of hashes: without it they are computed again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, path)
