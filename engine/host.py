"""What this machine has: memory (cgroup limits too), cores, CPU flags, disk. Pure reads, bytes throughout."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes; `limit_bytes` is the cgroup's, None where there is none."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None


def memory() -> Memory:
    """Memory that this process may still use: the machine's, or its cgroup's if that is less."""
    machine = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    if limit is None or limit >= machine.total:
        return Memory(machine.total, machine.available, None)
    return Memory(limit, max(0, min(machine.available, limit - used)), limit)


def cpu_name() -> str:
    """The processor's name, as the kernel gives it."""
    for line in _lines(PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags in the kernel's spelling; empty where it tells none."""
    for line in _lines(PROC / "cpuinfo"):
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def physical_cores() -> int:
    """Physical cores of the machine, whatever this process may use of them."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def usable_cores() -> int:
    """Cores worth a thread each: physical ones, within this process's affinity and CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(physical_cores(), allowed)
    quota = _cgroup_cpus()
    return max(1, cores if quota is None else min(cores, int(quota)))


def disk_free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system that holds path or its nearest parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _cgroup_memory() -> tuple[int | None, int]:
    """The tightest memory limit up the cgroup tree, and what is used under it without reclaimable cache."""
    tightest: tuple[int | None, int] = (None, 0)
    for folder, limit_name, used_name in _cgroup_folders():
        limit = _number(folder / limit_name)
        if limit is None or (tightest[0] is not None and limit >= tightest[0]):
            continue
        cache = _stat(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
        tightest = (limit, max(0, (_number(folder / used_name) or 0) - cache))
    return tightest


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    """Folders of this process's cgroup and its parents, version 2 or 1, with their file names."""
    found = []
    for line in _lines(PROC / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.strip("/")
        found += [(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(base)]
    return found


def _cgroup_cpus() -> float | None:
    quotas = []
    for folder, _, _ in _cgroup_folders():
        words = " ".join(_lines(folder / "cpu.max")).split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    quota, period = _number(CGROUP / "cpu/cpu.cfs_quota_us"), _number(CGROUP / "cpu/cpu.cfs_period_us")
    if quota and period and quota > 0:
        quotas.append(quota / period)
    return min(quotas, default=None)


def _stat(path: Path, names: tuple[str, ...]) -> int:
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name in names:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    words = " ".join(_lines(path)).split()
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
