"""Memory split, page cache and bandwidth: what is reported must follow what was done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import probe

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory through Linux's /proc")


def big_file(folder: Path, n_bytes: int = 16 << 20) -> Path:
    path = folder / "weights"
    path.write_bytes(os.urandom(1 << 20) * (n_bytes >> 20))
    return path


@needs_linux
def test_touched_private_memory_is_counted_as_private():
    before = probe.memory_split()
    held = np.ones(64 << 20, dtype=np.uint8)
    after = probe.memory_split()
    assert after.private_bytes - before.private_bytes > 0.9 * held.nbytes
    assert after.file_bytes - before.file_bytes < 0.1 * held.nbytes


@needs_linux
def test_mapped_file_is_counted_as_file(tmp_path):
    path = big_file(tmp_path, 64 << 20)
    before = probe.memory_split()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert mapped.max() > 0
    after = probe.memory_split()
    assert after.file_bytes - before.file_bytes > 0.9 * mapped.nbytes
    assert after.private_bytes - before.private_bytes < 0.1 * mapped.nbytes


@needs_linux
def test_parts_make_up_the_total_and_the_peak_is_no_less():
    split = probe.memory_split()
    assert split.source == "/proc"
    assert split.private_bytes + split.file_bytes == split.rss_bytes <= split.peak_rss_bytes


def test_process_that_has_ended_has_no_memory(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert probe.memory_split(child.pid) is None
    monkeypatch.setattr(probe, "PROC", Path("/nowhere"))
    assert probe.memory_split(child.pid) is None


def test_without_proc_the_split_says_that_psutil_made_it(monkeypatch):
    monkeypatch.setattr(probe, "PROC", Path("/nowhere"))
    split = probe.memory_split()
    assert split.source == "psutil"
    assert 0 < split.private_bytes <= split.rss_bytes


def test_peak_keeps_the_largest_of_each_part():
    peak = probe.Peak()
    peak.add(probe.MemorySplit(10, 7, 3, 12, "/proc"))
    peak.add(probe.MemorySplit(11, 2, 9, 13, "/proc"))
    peak.add(None)
    assert (peak.rss_bytes, peak.private_bytes, peak.file_bytes) == (13, 7, 9)


def test_evicted_file_is_cold_and_read_file_is_warm(tmp_path):
    path = big_file(tmp_path)
    share = probe.evict(path)
    if share is None or share > probe.COLD_SHARE:
        pytest.skip(f"this file system keeps {share} of an evicted file in memory")
    assert probe.warm(path) == 1.0
    assert probe.evict(path) <= probe.COLD_SHARE


def test_resident_share_counts_pages(tmp_path):
    path = big_file(tmp_path)
    if probe.evict(path) != 0.0:
        pytest.skip("this file system keeps evicted files in memory")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(fd, 4 << 20, 0)
    finally:
        os.close(fd)
    assert probe.resident_share(path) == pytest.approx(0.25, abs=0.05)


def test_empty_file_has_nothing_resident(tmp_path):
    (tmp_path / "empty").touch()
    assert probe.resident_share(tmp_path / "empty") == 0.0


def test_where_the_kernel_cannot_be_asked_nothing_is_claimed(tmp_path, monkeypatch):
    path = big_file(tmp_path)
    monkeypatch.setattr(probe, "_mincore", lambda: None)
    assert probe.resident_share(path) is None
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert probe.evict(path) is None


def test_bandwidth_is_bytes_over_the_time_of_the_slowest_thread(monkeypatch):
    monkeypatch.setattr(probe, "_read_all_s", lambda buffers: 0.5 * len(buffers))
    assert probe.read_bandwidth(n_threads=2, buffer_bytes=4096, rounds=3) == 2 * 4096 / 1.0


def test_bandwidth_of_this_machine_is_above_a_floppy_disk():
    assert probe.read_bandwidth(n_threads=2, buffer_bytes=8 << 20, rounds=1) > 1e6
