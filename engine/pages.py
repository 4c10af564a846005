"""Giving back file pages that nothing will read again: weights that llama.cpp copied when it repacked.

llama.cpp maps the whole file and keeps the mapping, so a repacked weight is in memory twice. Its
pages are clean: dropped, they would be read again from the file if anyone asked.
Source: llama.cpp, ggml/src/ggml-cpu/repack.cpp: which types and shapes are repacked on x86.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from engine.gguf_header import Header, Tensor

REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "Q2_K"})
ROWS = 8  # a repacked matrix has a multiple of so many rows
DONTNEED = 4  # MADV_DONTNEED
LOOKED_UP = "token_embd.weight"  # rows of it are read, never multiplied: not repacked


def release_repacked(header: Header) -> int:
    """Drop the mapped pages of repacked weights from this process; the bytes given back, 0 where it cannot be done."""
    base = _mapping(header.path)
    if base is None:
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    released = 0
    for tensor in header.tensors:
        if is_repacked(tensor):
            start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            n_bytes = (tensor.offset + tensor.n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if n_bytes > 0 and libc.madvise(base + start, n_bytes, DONTNEED) == 0:
                released += n_bytes
    return released


def is_repacked(tensor: Tensor) -> bool:
    """Whether llama.cpp keeps a copy of its own of this weight when it repacks."""
    return (
        tensor.qtype in REPACKED and len(tensor.shape) == 2 and tensor.shape[1] % ROWS == 0 and tensor.name != LOOKED_UP
    )


def _mapping(path: Path) -> int | None:
    """The address that the start of a file has, or would have: llama.cpp unmaps what lies before its first tensor."""
    found = path.stat()
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6 and int(words[4]) == found.st_ino:
            return int(words[0].split("-")[0], 16) - int(words[2], 16)
    return None
