"""What a process uses and what the machine gives: memory split, page cache, read bandwidth. Bytes and seconds.

Private memory is what the process alone pays for (anonymous pages); file-mapped memory is page
cache that the kernel may drop and other processes share, which is where mapped weights lie.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from engine.host import memory, usable_cores

PROC = Path("/proc")
COLD_SHARE = 0.001  # a file with less of it in the page cache counts as cold
READ_BUFFER_BYTES = 512 << 20  # per thread: many times any last-level cache
READ_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """Memory of a process now, and the peak of its total; `source` says who counted it."""

    rss_bytes: int
    private_bytes: int
    file_bytes: int
    peak_rss_bytes: int
    source: str


def memory_split(pid: int | None = None) -> MemorySplit | None:
    """The memory of a process (this one by default), None once it is gone.

    Source: proc_pid_status(5). Where there is no /proc, psutil's unique set size stands for
    private memory, and the peak is the present total unless the system counts one.
    """
    pid = os.getpid() if pid is None else pid
    if not PROC.is_dir():
        return _psutil_split(pid)
    fields = _status_fields(pid)
    if "VmRSS" not in fields:
        return None
    return MemorySplit(
        rss_bytes=fields["VmRSS"],
        private_bytes=fields["RssAnon"],
        file_bytes=fields["RssFile"] + fields["RssShmem"],
        peak_rss_bytes=fields["VmHWM"],
        source="/proc",
    )


def _status_fields(pid: int) -> dict[str, int]:
    try:
        lines = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _psutil_split(pid: int) -> MemorySplit | None:
    try:
        full = psutil.Process(pid).memory_full_info()
    except psutil.Error:
        return None
    peak_bytes = int(getattr(full, "peak_wset", full.rss))
    return MemorySplit(full.rss, full.uss, max(0, full.rss - full.uss), peak_bytes, "psutil")


@dataclass(slots=True)
class Peak:
    """The largest memory seen of one process, part by part; parts may peak at different times."""

    rss_bytes: int = 0
    private_bytes: int = 0
    file_bytes: int = 0
    source: str = "never sampled"

    def add(self, split: MemorySplit | None) -> None:
        """Take in one more sample; None, of a process that has ended, changes nothing."""
        if split is None:
            return
        self.rss_bytes = max(self.rss_bytes, split.peak_rss_bytes)
        self.private_bytes = max(self.private_bytes, split.private_bytes)
        self.file_bytes = max(self.file_bytes, split.file_bytes)
        self.source = split.source


def resident_share(path: Path) -> float | None:
    """Share of a file's pages in the page cache, 0 to 1; None where the system cannot tell.

    Source: mincore(2). For a file that this user neither owns nor may write, the kernel answers
    "all of it", so the share can be too high and never too low.
    """
    mincore = _mincore()
    if mincore is None:
        return None
    if path.stat().st_size == 0:
        return 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = np.frombuffer(data, dtype=np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
        failed = mincore(view.ctypes.data, view.nbytes, pages.ctypes.data)
        del view  # a mapping with a view on it cannot be closed
    return None if failed else float(np.mean(pages & 1))


def _mincore() -> Callable[[int, int, int], int] | None:
    """The C library's mincore(address, length, one byte per page), None where it has none."""
    function = getattr(ctypes.CDLL(None), "mincore", None) if os.name == "posix" else None
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return function


def evict(path: Path) -> float | None:
    """Ask the kernel to drop a file from the page cache; the share that stayed, None if it cannot be told.

    Dirty pages cannot be dropped, hence the fsync. A file system in memory keeps everything.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return resident_share(path)


def warm(path: Path) -> float | None:
    """Read a file once, so that it lies in the page cache as far as it fits; the share that does."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return resident_share(path)


def read_bandwidth(n_threads: int | None = None, buffer_bytes: int | None = None, rounds: int = READ_ROUNDS) -> float:
    """Bytes per second that all usable cores together read from memory: the best of several rounds.

    numpy's float32 maximum, of five ways tried, reads fastest: wide loads, no dependency between them.
    """
    n_threads = n_threads or usable_cores()
    if buffer_bytes is None:
        buffer_bytes = min(READ_BUFFER_BYTES, memory().available_bytes // (4 * n_threads))
    buffers = [np.ones(max(1, buffer_bytes // 4), dtype=np.float32) for _ in range(n_threads)]
    best_s = min(_read_all_s(buffers) for _ in range(rounds))
    return sum(buffer.nbytes for buffer in buffers) / best_s


def _read_all_s(buffers: Sequence[np.ndarray]) -> float:
    """Seconds until the last of one thread per buffer has read its own."""
    threads = [threading.Thread(target=buffer.max) for buffer in buffers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
