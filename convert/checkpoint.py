"""A checkpoint folder in an official layout: config.json, and name -> where each tensor lies.

    model.safetensors.index.json, or one model.safetensors        preferred
    pytorch_model.bin.index.json, or one pytorch_model.bin

Only headers are read here. Nothing in the folder is imported or run, and no name in an index
leads out of it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from convert.manifest import read_manifest
from convert.safetensors_shard import read_safetensors
from convert.shard import LocalShard, Shard
from convert.source_tensor import SourceTensor
from convert.torch_shard import read_torch_bin
from engine.errors import CheckpointError, NotFound, UnsafeCheckpoint

MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to name weight files, and what reads them."""

    index: str
    single: str
    shards: str  # pattern of the shards' names
    read: Callable[[Shard], dict[str, SourceTensor]]


LAYOUTS = (
    Layout("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors", read_safetensors),
    Layout("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin", read_torch_bin),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds; shards in the order of their names."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, SourceTensor]


def open_checkpoint(folder: Path, remote: Mapping[str, Shard] | None = None) -> Checkpoint:
    """Read config.json, the index and every shard's header; NotFound, CheckpointError or UnsafeCheckpoint.

    remote: weight files that are not in the folder but on a hub, by name.
    """
    remote = remote or {}
    if not folder.is_dir():
        raise NotFound(f"no checkpoint: {folder} is not a folder")
    config = _read_json(folder / "config.json")
    layout = _choose_layout(folder, remote)
    weight_map = _read_index(folder, layout)
    names = sorted(set(weight_map.values()) or {layout.single})
    hashes = {record.name: record.sha256 for record in read_manifest(folder).values() if record.is_whole}
    shards = tuple(remote.get(name) or _shard(folder, name, hashes.get(name)) for name in names)
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in layout.read(shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in {tensors[name].shard.name} and in {shard.name}")
            tensors[name] = tensor
    _check_index(folder / layout.index, weight_map, tensors)
    return Checkpoint(folder, config, shards, tensors)


def _choose_layout(folder: Path, remote: Mapping[str, Shard]) -> Layout:
    """The first layout of which any weight file is there: an index alone comes with every partial download."""
    for layout in LAYOUTS:
        is_remote = any(name == layout.single or PurePosixPath(name).match(layout.shards) for name in remote)
        if is_remote or (folder / layout.single).exists() or any(folder.glob(layout.shards)):
            return layout
    for layout in LAYOUTS:
        if (folder / layout.index).exists():
            return layout
    raise NotFound(f"no weights in {folder}: neither {LAYOUTS[0].shards} nor {LAYOUTS[1].shards}; fetch them")


def _read_index(folder: Path, layout: Layout) -> dict[str, str]:
    """Tensor -> file name; empty where one file holds everything and no index is there."""
    path = folder / layout.index
    if not path.exists():
        listed = sorted(folder.glob(layout.shards))
        if listed:
            raise NotFound(f"{path} is missing, though {listed[0].name} is there; fetch it")
        return {}
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no table weight_map of tensors and their files; fetch it again")
    known = set(weight_map.values())
    for found in sorted(folder.glob(layout.shards)):
        if found.name not in known:
            raise CheckpointError(f"shard {found.name} is not in {layout.index}: two checkpoints in one folder?")
    return weight_map


def _shard(folder: Path, name: str, sha256: str | None) -> LocalShard:
    if name in ("", ".", "..") or PurePosixPath(name).name != name or "\\" in name or "\0" in name:
        raise UnsafeCheckpoint(f"the index names {name!r}, which is not a plain file name: refused")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"shard {name} is missing from {folder}: fetch it")
    _check_inside(folder, path)
    return LocalShard(path, sha256)


def _check_inside(folder: Path, path: Path) -> None:
    """Links may point inside the folder or, in a hub's snapshot, to its blobs beside it; nowhere else."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise UnsafeCheckpoint(f"{path} links to {real}, outside of the checkpoint: refused")
    if not stat.S_ISREG(real.stat().st_mode):
        raise UnsafeCheckpoint(f"{path} is not a regular file: refused")


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor]) -> None:
    if not weight_map:
        return
    for name, shard in weight_map.items():
        found = tensors[name].shard.name if name in tensors else None
        if found != shard:
            where = f"it is in {found}" if found else "no shard holds it"
            raise CheckpointError(f"{index.name} puts tensor {name} into {shard}, but {where}; fetch both again")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{tensors[unlisted[0]].shard.name} holds {unlisted[0]}, which {index.name} does not list"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound(f"no checkpoint: {path} is missing")
    _check_inside(path.parent, path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value
