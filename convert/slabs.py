"""Cutting tensors into slabs of whole rows, and rows of the checkpoint into rows of the output.

Between the two lie at most three things: widening to float32, the interleaving of rotary rows,
and zeros: columns that fill a row up to whole blocks, rows that fill a part up to its new height.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.blocks import SOURCE_BYTES, first_non_finite, widen
from convert.plan import Item
from engine.errors import CheckpointError

SLAB_BYTES = 8 << 20  # of source: 16 MiB as float32


@dataclass(frozen=True, slots=True)
class Span:
    """Rows first to first + n_rows of a tensor as stored; from row out_first on in the output, then n_zero rows."""

    index: int
    first: int
    n_rows: int
    out_first: int
    n_zero: int


def spans(item: Item) -> list[Span]:
    """The slabs of a tensor in order: none crosses from one part of its rows into the next."""
    step = max(1, SLAB_BYTES // source_row_bytes(item))
    if item.rope_head_dim:
        step = max(item.rope_head_dim, step // item.rope_head_dim * item.rope_head_dim)
    height, out_height = item.n_rows // item.n_parts, item.n_out_rows // item.n_parts
    found: list[Span] = []
    for part in range(item.n_parts):
        for first in range(0, height, step):
            count = min(step, height - first)
            n_zero = out_height - height if first + count == height else 0
            found.append(Span(len(found), part * height + first, count, part * out_height + first, n_zero))
    return found


def source_row_bytes(item: Item) -> int:
    """Bytes of one row as it is stored."""
    return item.n_columns * SOURCE_BYTES[item.tensor.dtype]


def is_copied(item: Item) -> bool:
    """Whether the bytes of the output are those of the checkpoint, rotary order aside."""
    return (
        item.tensor.dtype == item.slot.qtype and item.n_columns == item.slot.shape[0] and item.n_rows == item.n_out_rows
    )


def check_finite(item: Item, span: Span, raw: np.ndarray) -> None:
    """CheckpointError naming the tensor and the place of the first NaN or infinity."""
    bad = first_non_finite(item.tensor.dtype, raw)
    if bad is not None:
        raise CheckpointError(
            f"tensor {item.tensor.name} in {item.tensor.shard.name}: value {span.first * item.n_columns + bad} "
            "is not a finite number; the checkpoint is damaged: fetch it again"
        )


def ordered(item: Item, raw: np.ndarray) -> np.ndarray:
    """Stored rows in the output's order: half-split heads become interleaved where llama.cpp's `llama` wants it.

    Source: llama.cpp, conversion/llama.py: permute.
    """
    if item.rope_head_dim is None:
        return raw
    heads = raw.reshape(-1, 2, item.rope_head_dim // 2, source_row_bytes(item))
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1)


def float_rows(item: Item, span: Span, raw: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """A slab as rows of the output, float32 (n_rows + n_zero, columns), made in the buffer given.

    floats: at least as many values as the rows have; where columns are added a second buffer is made.
    """
    n_columns, n_out = item.n_columns, item.slot.shape[0]
    rows = floats[: (span.n_rows + span.n_zero) * n_out].reshape(-1, n_out)
    if n_columns == n_out:
        widen(item.tensor.dtype, ordered(item, raw), rows[: span.n_rows])
    else:
        narrow = np.empty((span.n_rows, n_columns), np.float32)
        widen(item.tensor.dtype, ordered(item, raw), narrow)
        rows[: span.n_rows, :n_columns] = narrow
        rows[: span.n_rows, n_columns:] = 0
    rows[span.n_rows :] = 0
    return rows


def read_rows(item: Item) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor of a local checkpoint as float32 rows of the output, with the first row's number."""
    with item.tensor.shard.open() as file:
        for span in spans(item):
            file.seek(item.tensor.offset + span.first * source_row_bytes(item))
            raw = np.frombuffer(file.read(span.n_rows * source_row_bytes(item)), np.uint8)
            floats = np.empty((span.n_rows + span.n_zero) * item.slot.shape[0], np.float32)
            yield span.out_first, float_rows(item, span, raw, floats)
