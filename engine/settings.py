"""How a model runs on this machine: threads, batch, repacking; measured by `fourbit tune`, or safe defaults.

Measured settings are kept in $FOURBIT_HOME/tune.json, by machine (processor, cores that may be used),
model (key and bytes of weights) and build of llama.cpp: whatever changes, they no longer apply.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.gguf_header import Header
from engine.home import home
from engine.host import cpu_flags, cpu_name, usable_cores

N_BATCH = 128  # a Ctrl-C takes effect between batches, and compute buffers grow with them
FLASH_ATTENTION = ("auto", "on", "off")
KV_QTYPES = ("F16", "Q8_0")


@dataclass(frozen=True, slots=True)
class Settings:
    """n_threads evaluate one id, n_threads_batch a batch of up to n_batch; repack: llama.cpp's private copies."""

    n_threads: int
    n_threads_batch: int
    n_batch: int = N_BATCH
    repack: bool = False
    flash_attention: str = "auto"
    kv_qtype: str = "F16"

    def changed(self, **values: Any) -> Settings:
        """These settings with those values that are not None."""
        return dataclasses.replace(self, **{name: value for name, value in values.items() if value is not None})


def defaults() -> Settings:
    """One thread a usable core, weights in the page cache."""
    cores = usable_cores()
    return Settings(cores, cores)


def settings_for(header: Header) -> Settings:
    """What was measured for this file on this machine, else the defaults."""
    found = _read().get(_key(header))
    if found is None:
        return defaults()
    try:
        settings = Settings(**found)
    except TypeError:
        return defaults()
    return settings if _is_sound(settings) else defaults()


def is_tuned(header: Header) -> bool:
    """Whether settings were measured for this file on this machine."""
    return _key(header) in _read()


def keep(header: Header, settings: Settings) -> Path:
    """Use these settings for this file from now on; where they are kept."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps({**_read(), _key(header): asdict(settings)}, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _is_sound(settings: Settings) -> bool:
    numbers = (settings.n_threads, settings.n_threads_batch, settings.n_batch)
    return (
        all(type(number) is int and 0 < number <= 4096 for number in numbers)
        and type(settings.repack) is bool
        and settings.flash_attention in FLASH_ATTENTION
        and settings.kv_qtype in KV_QTYPES
    )


def _path() -> Path:
    return home() / "tune.json"


def _key(header: Header) -> str:
    weights = header.file_bytes - header.data_offset
    model = f"{header.metadata.get('general.architecture')}:{header.metadata.get('general.file_type')}:{weights}"
    machine = f"{cpu_name()}:{len(cpu_flags())}:{usable_cores()} cores"
    return f"{machine}|{model}|llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(_path().read_bytes())
        if isinstance(data, dict):
            return data
    return {}
