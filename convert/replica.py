"""A file of a model's exact shapes and mixture with made-up weights: measure before downloading.

Speed, memory and load time depend on shapes and block types, not on values. One small tile of
random values is quantized for each kind of row and repeated, so nothing is ever held as floats
and writing is as fast as the disk.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.blocks import quantize_rows, row_bytes
from convert.families import FAMILIES, model_entries, targets
from convert.gguf_file import Slot
from convert.output_file import OutputFile, create
from convert.pipeline import Progress
from convert.plan import output_shape, own_entries, padding_entries, place
from convert.quantize import Written, refuse_existing
from convert.vocab import made_vocabulary, vocabulary_entries
from engine.home import home
from engine.registry import Model, Shape

TILE_ROWS = 64  # enough that rows differ, few enough to quantize in milliseconds
WRITE_BYTES = 16 << 20
SEED = 20231025


def replica_file(model: Model, ftype: str) -> Path:
    """Where a replica is written unless asked otherwise: never where a real model is looked for."""
    return home() / "replicas" / f"{model.key}-{ftype}-replica.gguf"


def replica_shape(model: Model, n_layer: int | None = None) -> Shape:
    """The model's shape, with fewer layers if asked."""
    return dataclasses.replace(model.shape, n_layer=n_layer or model.shape.n_layer)


def replica_slots(model: Model, ftype: str, n_layer: int | None = None, pad_ff: bool | None = None) -> tuple[Slot, ...]:
    """The tensors of a replica, types and sizes, before anything is written."""
    shape = replica_shape(model, n_layer)
    wanted = targets(FAMILIES[model.family], shape, output_shape(model, shape, ftype, pad_ff))
    return place([(target.name, target.shape) for target in wanted], ftype)


def write_replica(
    model: Model,
    ftype: str,
    out: Path | None = None,
    *,
    n_layer: int | None = None,
    pad_ff: bool | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Write a replica of a model, with fewer layers if asked; raises as quantize() does."""
    start = time.perf_counter()
    shape, slots = replica_shape(model, n_layer), replica_slots(model, ftype, n_layer, pad_ff)
    padded = output_shape(model, shape, ftype, pad_ff)
    entries = [*model_entries(model, FAMILIES[model.family], padded), *vocabulary_entries(made_vocabulary(model))]
    entries += padding_entries(shape, padded)
    entries += own_entries(model, ftype, (), replica=True)
    path = replica_file(model, ftype) if out is None else out
    refuse_existing(path, overwrite)
    with create(path, entries, slots) as output:
        _write_tensors(output, slots, on_progress)
        n_bytes = output.publish(entries)
    return Written(path, model.key, ftype, len(slots), n_bytes, time.perf_counter() - start)


def _write_tensors(output: OutputFile, slots: tuple[Slot, ...], on_progress: Callable[[Progress], None] | None) -> None:
    total, done = sum(slot.n_bytes for slot in slots), 0
    tiles: dict[tuple[str, int, float], np.ndarray] = {}
    for slot in slots:
        mean, spread = _distribution(slot)
        key = (slot.qtype, slot.shape[0], mean)
        if key not in tiles:
            tiles[key] = _tile(slot.qtype, slot.shape[0], len(slot.shape) > 1, mean, spread)
        _repeat(output, slot, tiles[key])
        done += slot.n_bytes
        if on_progress:
            on_progress(Progress(slot.name, done, total))


def _distribution(slot: Slot) -> tuple[float, float]:
    """Mean and spread of made-up values: norms near one, the rest as small as trained weights are."""
    return (1.0, 0.1) if slot.name.endswith("_norm.weight") else (0.0, slot.shape[0] ** -0.5)


def _tile(qtype: str, n_per_row: int, is_matrix: bool, mean: float, spread: float) -> np.ndarray:
    """Bytes of some quantized rows, repeated to a size worth a write: (n,) uint8, whole rows."""
    n_rows = TILE_ROWS if is_matrix else 1
    rows = np.random.default_rng(SEED).normal(mean, spread, (n_rows, n_per_row)).astype(np.float32)
    tile = np.empty(n_rows * row_bytes(qtype, n_per_row), np.uint8)
    quantize_rows(qtype, rows, tile)
    return np.tile(tile, max(1, WRITE_BYTES // tile.nbytes)) if is_matrix else tile


def _repeat(output: OutputFile, slot: Slot, tile: np.ndarray) -> None:
    for offset in range(0, slot.n_bytes, tile.nbytes):
        output.write(slot, offset, tile[: slot.n_bytes - offset])
