"""Write a full-size made-up checkpoint in the official layout: `python -m tests.full_checkpoint MODEL DIR`.

About 15 GB: the official names, shapes, types and number of shards, in little memory. Values are one
tile of random ones repeated: what conversion costs does not depend on them.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.registry import Model, model
from tests.checkpoints import DTYPES, config, official_tensors, stored, torch_pickle_of
from tests.tokenizers import write_made_tokenizer

N_SHARDS = {"qwen": 8, "chatglm3": 7, "deepseek-llm": 2}
IS_BIN = {"qwen": False, "chatglm3": False, "deepseek-llm": True}
TILE_VALUES = 4 << 20
Tensors = Sequence[tuple[str, tuple[int, ...]]]


def write_full_checkpoint(spec: Model, folder: Path) -> None:
    """config.json, tokenizer, shards and index of a model of models.toml."""
    folder.mkdir(parents=True)
    family, tensors = spec.family, list(official_tensors(spec.family, spec.shape))
    (folder / "config.json").write_text(json.dumps(config(family, spec.shape)), encoding="utf-8")
    write_made_tokenizer(folder, family)
    stem, ending = ("pytorch_model", "bin") if IS_BIN[family] else ("model", "safetensors")
    write = _write_bin if IS_BIN[family] else _write_safetensors
    values = np.random.default_rng(1).normal(0, 0.02, TILE_VALUES).astype(np.float32)
    tile = stored(values, DTYPES[family])
    weight_map, n_shards = {}, N_SHARDS[family]
    for i in range(n_shards):
        part = tensors[len(tensors) * i // n_shards : len(tensors) * (i + 1) // n_shards]
        name = f"{stem}-{i + 1:05}-of-{n_shards:05}.{ending}"
        with (folder / name).open("wb") as file:
            write(file, part, DTYPES[family], tile)
        weight_map |= dict.fromkeys((tensor for tensor, _ in part), name)
    index = "pytorch_model.bin.index.json" if IS_BIN[family] else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _chunks(n_bytes: int, tile: bytes) -> Iterator[bytes]:
    for start in range(0, n_bytes, len(tile)):
        yield tile[: n_bytes - start]


def _write_safetensors(file: BinaryIO, tensors: Tensors, dtype: str, tile: bytes) -> None:
    header, offset = {}, 0
    for name, shape in tensors:
        n_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    for _, shape in tensors:
        for chunk in _chunks(2 * math.prod(shape), tile):
            file.write(chunk)


def _write_bin(file: BinaryIO, tensors: Tensors, dtype: str, tile: bytes) -> None:
    """A zip with stored entries of 64-bit sizes, as torch writes shards above 4 GB."""
    entries = [_write_entry(file, "archive/data.pkl", [torch_pickle_of(tensors, dtype)])]
    for key, (_, shape) in enumerate(tensors):
        entries.append(_write_entry(file, f"archive/data/{key}", list(_chunks(2 * math.prod(shape), tile))))
    start = file.tell()
    for name, crc, n_bytes, offset in entries:
        extra = struct.pack("<HHQQQ", 1, 24, n_bytes, n_bytes, offset)
        head = struct.pack("<4sHHHHHHLLL", b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, *[0xFFFFFFFF] * 2)
        head += struct.pack("<HHHHHLL", len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
        file.write(head + name.encode() + extra)
    end = file.tell()
    n = len(entries)
    file.write(struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, n, n, end - start, start))
    file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
    file.write(struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _write_entry(file: BinaryIO, name: str, chunks: list[bytes]) -> tuple[str, int, int, int]:
    """One stored entry, its data aligned to 64 bytes: name, crc, size, offset."""
    offset, n_bytes, crc = file.tell(), sum(map(len, chunks)), 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    sizes = struct.pack("<HHQQ", 1, 16, n_bytes, n_bytes)
    fill = -(offset + 30 + len(name) + len(sizes) + 4) % 64
    extra = sizes + struct.pack("<2sH", b"FB", fill) + b"Z" * fill
    head = struct.pack("<4sHHHHHLLLHH", b"PK\3\4", 45, 0, 0, 0, 33, crc, *[0xFFFFFFFF] * 2, len(name), len(extra))
    file.write(head + name.encode() + extra)
    for chunk in chunks:
        file.write(chunk)
    return name, crc, n_bytes, offset


if __name__ == "__main__":
    write_full_checkpoint(model(sys.argv[1]), Path(sys.argv[2]))
