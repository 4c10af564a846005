"""NAME.gguf.json beside a NAME.gguf: what it was made of, and the hashes that prove it whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import GGUFError

CHUNK_BYTES = 4 << 20
MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One weight file that an output was made of."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Hashes of a published file, of its tensors by name, and of its sources; all sha256 as hex."""

    file: str
    n_bytes: int
    sha256: str
    model: str
    ftype: str
    fourbit: str
    quantizer: str
    sources: tuple[Source, ...]
    tensors: Mapping[str, str]

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a GGUF file lies."""
    return path.with_name(path.name + ".json")


def write_sidecar(path: Path, content: Mapping[str, Any]) -> None:
    """Write the sidecar of a GGUF file, whole or not at all."""
    target = sidecar_path(path)
    temporary = target.with_name(f".{target.name}.part")
    data = json.dumps(content, indent=1).encode("utf-8")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    try:
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)
    os.replace(temporary, target)
    sync_folder(target.parent)


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of a GGUF file, None where there is none; GGUFError when it is no sidecar."""
    target = sidecar_path(path)
    try:
        if target.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {target.stat().st_size} bytes, at most {MAX_BYTES} make sense")
        data = json.loads(target.read_bytes())
        sources = tuple(Source(**source) for source in data.pop("sources"))
        return Sidecar(sources=sources, **data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise GGUFError(f"{target} is not a sidecar of fourbit ({error}): remove it or convert again") from error


def sha256_of(path: Path) -> str:
    """The sha256 of a whole file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
