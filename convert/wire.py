"""Bytes of a file over HTTP, from any position on: goes on after a broken connection, then elsewhere.

A server may break off, ignore Range, answer with errors, lie about lengths or crawl; every answer is
held against the size and position that are wanted before its bytes are believed. What a file's bytes
must hash to is the caller's to check.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import requests
import urllib3

from engine.errors import FetchError

CHUNK_BYTES = 1 << 18
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
PERMANENT = {401: "login is needed", 403: "access is refused", 404: "there is no such file", 410: "it is gone"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a place is tried: attempts without progress, waits that double, and the slowest rate taken."""

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 30.0
    slowest_bytes_per_s: float = 1024.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one hub has a file."""

    source: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class _Broken(Exception):
    """An attempt failed; another may not."""


class _Refused(Exception):
    """This place will not give the file, however often it is asked."""


def read(
    name: str,
    n_bytes: int,
    places: Iterable[Place],
    *,
    start: int = 0,
    stop: int | None = None,
    patience: Patience | None = None,
) -> Iterator[bytes]:
    """The bytes of a file from start to stop; FetchError when no place gives them.

    places: in order of preference, taken one after the other; the next goes on where the last stopped.
    """
    patience, end, position = patience or Patience(), n_bytes if stop is None else stop, start
    said: list[str] = []
    with requests.Session() as session:
        for place in places:
            n_failed = 0
            while position < end and n_failed < patience.attempts:
                before = position
                try:
                    for chunk in _answer(session, place, position, end, n_bytes, patience):
                        position += len(chunk)
                        yield chunk
                except _Refused as error:
                    said.append(f"{place.source}: {error}")
                    break
                except _Broken as error:
                    n_failed = 1 if position > before else n_failed + 1
                    if n_failed == patience.attempts:
                        said.append(f"{place.source}: {error}")
                    else:
                        time.sleep(patience.first_wait_s * 2 ** (n_failed - 1))
            if position >= end:
                return
    raise FetchError(_sentence(name, position - start, end - start, said))


def _sentence(name: str, n_got: int, n_wanted: int, said: list[str]) -> str:
    got = f"{n_got} of {n_wanted} bytes" if n_got else "0 bytes"
    reasons = "; ".join(said) or "no hub has it"
    return f"{name}: {got} received ({reasons}): check the connection and run again, what has come is kept"


def _answer(
    session: requests.Session, place: Place, position: int, end: int, n_bytes: int, patience: Patience
) -> Iterator[bytes]:
    """What one request yields of the bytes from position to end; never more."""
    headers = {**place.headers, "Accept-Encoding": "identity", "Range": f"bytes={position}-{end - 1}"}
    with _translated():
        response = session.get(place.url, headers=headers, stream=True, timeout=(10, patience.timeout_s))
        with response:
            to_skip = _checked(response, position, n_bytes)
            started, n_got = time.monotonic(), 0
            while position < end:
                chunk = response.raw.read1(CHUNK_BYTES)
                if not chunk:
                    raise _Broken(f"the connection ended at byte {position} of {n_bytes}")
                n_got += len(chunk)
                _check_rate(n_got, time.monotonic() - started, patience)
                if to_skip:
                    n_skipped = min(to_skip, len(chunk))
                    chunk, to_skip = chunk[n_skipped:], to_skip - n_skipped
                chunk = chunk[: end - position]
                position += len(chunk)
                if chunk:
                    yield chunk


def _check_rate(n_bytes: int, seconds: float, patience: Patience) -> None:
    if seconds > patience.timeout_s and n_bytes / seconds < patience.slowest_bytes_per_s:
        raise _Broken(f"only {n_bytes / seconds:.0f} bytes a second came")


def _checked(response: requests.Response, position: int, n_bytes: int) -> int:
    """How many bytes of an answer lie before the position; _Broken or _Refused when it is no answer."""
    status = response.status_code
    if status in PERMANENT:
        raise _Refused(f"{PERMANENT[status]} (HTTP {status})")
    if status == 206:
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != position:
            raise _Broken(f"asked for byte {position}, it answers {response.headers.get('Content-Range')!r}")
        if found[3] != "*" and int(found[3]) != n_bytes:
            raise _Refused(f"the file has {found[3]} bytes there, {n_bytes} are expected")
        return 0
    if status == 200:  # Range is ignored: the file from its start
        length = response.headers.get("Content-Length", str(n_bytes))
        if not length.isdigit() or int(length) != n_bytes:
            raise _Refused(f"the file has {length[:20]} bytes there, {n_bytes} are expected")
        return position
    if status == 416:
        raise _Refused(f"the file ends before byte {position} there, {n_bytes} are expected")
    raise _Broken(f"HTTP {status}")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise _Broken("it did not answer in time") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _Broken(_cause(error)) from error


def _cause(error: BaseException) -> str:
    """The innermost reason: urllib3 wraps a refused connection five times."""
    text = str(error)
    if "Name or service not known" in text or "NameResolutionError" in text or "getaddrinfo" in text:
        return "its name cannot be resolved: this machine seems to be offline"
    if "Connection refused" in text:
        return "the connection is refused"
    if "Network is unreachable" in text:
        return "the network cannot be reached: this machine seems to be offline"
    return f"the connection broke ({type(error).__name__})"
