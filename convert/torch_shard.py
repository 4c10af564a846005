"""A torch .bin shard as name -> SourceTensor, without torch: a zip of raw values and a pickle that names them.

    NAME/data.pkl    the table of tensors (pickle_index.py)
    NAME/data/KEY    one storage each, stored uncompressed, so its values can be read in place

Source: torch/csrc/jit/serialization: a zip whose entries are stored and aligned to 64 bytes.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401 - zipfile decodes odd names by it: nothing is imported while a file is read
import math
import struct
import zipfile
from typing import BinaryIO

from convert.pickle_index import View, read_pickle_index
from convert.shard import Shard
from convert.source_tensor import DTYPE_BYTES, SourceTensor
from engine.errors import CheckpointError, UnsafeCheckpoint

MAX_PICKLE_BYTES = 64 << 20
LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")


def read_torch_bin(shard: Shard) -> dict[str, SourceTensor]:
    """The tensors of one shard; CheckpointError says what is wrong, UnsafeCheckpoint what is not data."""
    try:
        with shard.open() as file:
            entries = _entries(shard, file)
            prefix = _pickle_name(entries).removesuffix("data.pkl")
            _check_byte_order(file, entries.get(prefix + "byteorder"))
            views = read_pickle_index(_content(file, entries[prefix + "data.pkl"], MAX_PICKLE_BYTES))
        return {name: _tensor(shard, name, view, entries, prefix) for name, view in views.items()}
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{shard}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(f"{shard} is truncated or not a torch shard: {error}; fetch it again") from error


Place = tuple[int, int]  # offset and size of an entry's bytes in the file


def _entries(shard: Shard, file: BinaryIO) -> dict[str, Place]:
    """Every entry's place, its local header agreeing with the directory, none overlapping."""
    end_of_file = shard.n_bytes
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    if min((info.header_offset for info in infos), default=0) != 0:
        raise ValueError("something lies before its first entry")
    places: dict[str, Place] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"its entry {info.filename!r} is compressed or encrypted")
        offset = _data_offset(file, info)
        if info.header_offset < end or info.filename in places:
            raise ValueError(f"its entry {info.filename!r} overlaps another or occurs twice")
        end = offset + info.file_size
        if end > end_of_file:
            raise ValueError(f"its entry {info.filename!r} ends at byte {end}, the file has {end_of_file}")
        places[info.filename] = (offset, info.file_size)
    return places


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    name = file.read(fields[9])
    if fields[0] != b"PK\x03\x04" or fields[3] != 0 or name != info.orig_filename.encode("utf-8"):
        raise ValueError(f"the header of its entry {info.filename!r} does not agree with its directory")
    return info.header_offset + LOCAL_HEADER.size + int(fields[9]) + int(fields[10])


def _pickle_name(entries: dict[str, Place]) -> str:
    names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UnsafeCheckpoint(f"{len(names)} entries are called data.pkl; a shard of tensors has one")
    return names[0]


def _check_byte_order(file: BinaryIO, place: Place | None) -> None:
    if place is not None and (order := _content(file, place, 16)) != b"little":
        raise ValueError(f"its byte order is {order!r}, not b'little'")


def _content(file: BinaryIO, place: Place, limit: int) -> bytes:
    offset, n_bytes = place
    if n_bytes > limit:
        raise ValueError(f"an entry of {n_bytes} bytes where at most {limit} make sense")
    file.seek(offset)
    return file.read(n_bytes)


def _tensor(shard: Shard, name: str, view: View, entries: dict[str, Place], prefix: str) -> SourceTensor:
    storage, width = view.storage, DTYPE_BYTES[view.storage.dtype]
    offset, n_bytes = entries.get(f"{prefix}data/{storage.key}", (0, -1))
    if n_bytes != storage.n_values * width:
        raise ValueError(f"tensor {name}: storage {storage.key} has {n_bytes} bytes, not {storage.n_values * width}")
    n_values = math.prod(view.shape)
    if view.offset + n_values > storage.n_values:
        raise ValueError(f"tensor {name} of shape {view.shape} exceeds its storage of {storage.n_values} values")
    if not _is_contiguous(view):
        raise ValueError(f"tensor {name} has stride {view.stride} for shape {view.shape}; only row-major is read")
    return SourceTensor(name, storage.dtype, view.shape, shard, offset + view.offset * width, n_values * width)


def _is_contiguous(view: View) -> bool:
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
