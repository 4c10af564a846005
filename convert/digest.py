"""SHA-256 whose progress can be saved, so that a hash begun in one run is ended in the next.

hashlib cannot be saved. libcrypto's own functions keep their state in a plain struct of 112 bytes;
where it is missing, or is not Linux's, hashes work all the same and save() returns None: a run that
goes on then reads from the start of the file.
Source: openssl/sha.h: SHA256_CTX: h[8], Nl, Nh, data[16], num, md_len, all 32 bits.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import functools
import hashlib
import struct
import sys
from typing import Any

import numpy as np

STATE_BYTES = 112
BLOCK_BYTES, DIGEST_BYTES = 64, 32
_NAMES = ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so")


class Sha256:
    """A running SHA-256."""

    def __init__(self) -> None:
        self._library = _library()
        self._hash = None if self._library else hashlib.sha256()
        self._state = ctypes.create_string_buffer(STATE_BYTES)
        if self._library:
            self._library.SHA256_Init(self._state)

    def update(self, data: np.ndarray | bytes) -> None:
        """Add bytes: a contiguous uint8 array, or bytes."""
        if self._hash is not None:
            self._hash.update(data.data if isinstance(data, np.ndarray) else data)
        elif isinstance(data, np.ndarray):
            self._library.SHA256_Update(self._state, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        else:
            self._library.SHA256_Update(self._state, data, ctypes.c_size_t(len(data)))

    def hexdigest(self) -> str:
        """The hash of everything so far; more may follow."""
        if self._hash is not None:
            return self._hash.hexdigest()
        state = ctypes.create_string_buffer(self._state.raw, STATE_BYTES)
        digest = ctypes.create_string_buffer(DIGEST_BYTES)
        self._library.SHA256_Final(digest, state)
        return digest.raw.hex()

    def save(self) -> str | None:
        """The progress as text, None where it cannot be saved."""
        return base64.b64encode(self._state.raw).decode("ascii") if self._hash is None else None


def restore(saved: str, hexdigest: str) -> Sha256 | None:
    """The hash that save() was called on; None unless it gives the digest that it gave then."""
    made = Sha256()
    try:
        state = base64.b64decode(saved, validate=True)
    except (ValueError, binascii.Error):
        return None
    if made.save() is None or not _is_sound(state):
        return None
    made._state = ctypes.create_string_buffer(state, STATE_BYTES)
    return made if made.hexdigest() == hexdigest else None


def _is_sound(state: bytes) -> bool:
    """Whether libcrypto may be given these bytes: num is an index in its code."""
    if len(state) != STATE_BYTES:
        return False
    num, md_len = struct.unpack("<II", state[-8:])
    return bool(num < BLOCK_BYTES and md_len == DIGEST_BYTES)


@functools.cache
def _library() -> Any:
    """libcrypto, once its functions have been seen to work on a saved state; None otherwise."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return None
    for name in _NAMES:  # by name: ctypes.util.find_library runs programs to find it
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if _works(library):
            return library
    return None


def _works(library: ctypes.CDLL) -> bool:
    if not all(hasattr(library, name) for name in ("SHA256_Init", "SHA256_Update", "SHA256_Final")):
        return False
    state = ctypes.create_string_buffer(STATE_BYTES + 64)  # room, should the struct be larger here
    digest = ctypes.create_string_buffer(DIGEST_BYTES)
    library.SHA256_Init(state)
    library.SHA256_Update(state, b"four", ctypes.c_size_t(4))
    if any(state.raw[STATE_BYTES:]) or not _is_sound(state.raw[:STATE_BYTES]):
        return False
    copy = ctypes.create_string_buffer(state.raw, STATE_BYTES + 64)
    library.SHA256_Update(copy, b"bit", ctypes.c_size_t(3))
    library.SHA256_Final(digest, copy)
    return digest.raw == hashlib.sha256(b"fourbit").digest()
