"""fetched.json in a checkpoint folder: what belongs there, what it must hash to, and what is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.sidecar import sync_folder
from engine.errors import CheckpointError

NAME = "fetched.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One file: its size and hashes as first seen on a hub; sha256 is what was received once it is whole."""

    name: str
    n_bytes: int
    sha256: str | None
    git_sha1: str | None
    source: str
    revision: str
    is_whole: bool = False


def read_manifest(folder: Path) -> dict[str, Record]:
    """The records of a folder by name, none where nothing was fetched; CheckpointError when damaged."""
    path = folder / NAME
    try:
        return {item["name"]: Record(**item) for item in json.loads(path.read_bytes())["files"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it and fetch again") from error


def write_manifest(folder: Path, records: Mapping[str, Record]) -> None:
    """Replace the manifest, whole or not at all."""
    temporary = folder / f".{NAME}.part"
    data = json.dumps({"files": [asdict(record) for record in records.values()]}, indent=1).encode("utf-8")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    sync_folder(folder)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint: all of what was to be fetched, or one that came otherwise."""
    records = read_manifest(folder)
    if not records:
        return (folder / "config.json").is_file()
    return all(
        record.is_whole and (folder / record.name).is_file() and (folder / record.name).stat().st_size == record.n_bytes
        for record in records.values()
    )
