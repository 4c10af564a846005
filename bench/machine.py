"""The card of the machine: what every number of a run was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from dataclasses import dataclass

from bench.probe import read_bandwidth
from engine.host import cpu_name, memory, physical_cores, usable_cores


@dataclass(frozen=True, slots=True)
class Card:
    """Processor, memory and builds; `read_bytes_per_s` is what all used cores together read from memory."""

    date: str
    cpu: str
    n_threads: int
    n_physical_cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    read_bytes_per_s: float
    llama_cpp_python: str
    llama_flags: str
    omp_wait_policy: str
    python: str
    fourbit: str


def read_card() -> Card:
    """Look at this machine; takes a second or two, for the read bandwidth. NativeError without llama.cpp."""
    from engine import native  # sets OMP_WAIT_POLICY and loads llama.cpp

    build, now = native.build_info(), memory()
    return Card(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        cpu=cpu_name(),
        n_threads=usable_cores(),
        n_physical_cores=physical_cores(),
        memory_total_bytes=now.total_bytes,
        memory_available_bytes=now.available_bytes,
        memory_limit_bytes=now.limit_bytes,
        read_bytes_per_s=read_bandwidth(),
        llama_cpp_python=build.version,
        llama_flags=build.flags,
        omp_wait_policy=_waiting(),
        python=platform.python_version(),
        fourbit=importlib.metadata.version("fourbit"),
    )


def _waiting() -> str:
    policy, spins = (os.environ.get(name, "unset") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return f"{policy}, GOMP_SPINCOUNT={spins}"
