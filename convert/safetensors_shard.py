"""A .safetensors shard as name -> SourceTensor: only its header is read, and nothing in it is trusted.

    header length u64 | JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

As strict as the official package: offsets cover the bytes without gap or overlap, the file ends where
the last tensor does, no name occurs twice. Stricter in four things, none of which a checkpoint needs:
dtypes below a byte or newer than DTYPE_BYTES, more than 8 dimensions, one of more than 2^40, and keys
of an entry that the format does not have (to another reader they may mean something).
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from convert.shard import Shard
from convert.source_tensor import DTYPE_BYTES, SourceTensor
from engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 1 << 40


def read_safetensors(shard: Shard) -> dict[str, SourceTensor]:
    """The tensors of one shard; CheckpointError says what is wrong with it."""
    try:
        with shard.open() as file:
            n_bytes = shard.n_bytes
            header_bytes = _header_bytes(shard, file.read(8), n_bytes)
            raw = file.read(header_bytes)
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        return _tensors(shard, header, 8 + header_bytes, n_bytes)
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shard} is not a safetensors file: {error}; fetch it again") from error


def _header_bytes(shard: Shard, prefix: bytes, n_bytes: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{shard} is truncated: it has {n_bytes} bytes; fetch it again")
    header_bytes: int = struct.unpack("<Q", prefix)[0]
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{shard}: a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    if 8 + header_bytes > n_bytes:
        raise CheckpointError(
            f"{shard} is truncated: its header ends at byte {8 + header_bytes}, the file has {n_bytes}; fetch it again"
        )
    return header_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _tensors(shard: Shard, header: Any, data_offset: int, n_bytes: int) -> dict[str, SourceTensor]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    _check_metadata(header.pop("__metadata__", None))
    found = [_tensor(shard, name, entry, data_offset) for name, entry in header.items()]
    end = data_offset
    for tensor in sorted(found, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset != end:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.offset}, the one before ends at {end}")
        end += tensor.n_bytes
    if end > n_bytes:
        raise CheckpointError(f"{shard} is truncated: {end} bytes are needed, it has {n_bytes}; fetch it again")
    if end < n_bytes:
        raise ValueError(f"its tensors end at byte {end}, it has {n_bytes}")
    return {tensor.name: tensor for tensor in found}


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of strings")


def _tensor(shard: Shard, name: str, entry: Any, data_offset: int) -> SourceTensor:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has not exactly a dtype, a shape and data_offsets")
    dtype, shape = entry["dtype"], _naturals(name, entry["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    offsets = _naturals(name, entry["data_offsets"])
    n_bytes = _size(name, shape, DTYPE_BYTES[dtype])
    if len(offsets) != 2 or offsets[1] - offsets[0] != n_bytes:
        raise ValueError(f"tensor {name!r} of {dtype} {list(shape)} cannot lie at {list(offsets)}")
    return SourceTensor(name, dtype, shape, shard, data_offset + offsets[0], n_bytes)


def _size(name: str, shape: tuple[int, ...], width: int) -> int:
    """Bytes of a tensor; a product beyond 64 bits of bits on the way is refused, even if a 0 follows."""
    product = 1
    for number in shape:
        product *= number
        if product >= 1 << 64:
            break
    if 8 * product * width >= 1 << 64:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} is larger than any file")
    return product * width


def _naturals(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 8 or not all(type(v) is int for v in values):
        raise ValueError(f"tensor {name!r}: {str(values)[:60]} is not a short list of whole numbers")
    if any(not 0 <= value <= MAX_DIMENSION for value in values):
        raise ValueError(f"tensor {name!r}: {values} holds a number outside 0 to {MAX_DIMENSION}")
    return tuple(values)
