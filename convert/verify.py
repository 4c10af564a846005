"""Is a GGUF file whole and right: its structure, its blocks, its sidecar's hashes, its checkpoint's weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.blocks import blocks_are_valid, dequantize_rows, row_bytes
from convert.mixture import MIXTURES
from convert.pipeline import Progress
from convert.plan import Item, Plan, plan_conversion
from convert.sidecar import Sidecar, read_sidecar
from convert.slabs import read_rows
from engine.errors import CheckpointError, GGUFError, NotFound
from engine.gguf_header import Header, Tensor, read_header

SLICE_BYTES = 8 << 20
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a tensor's weights are from the checkpoint's: root mean square, relative to theirs, and the largest."""

    tensor: str
    qtype: str
    relative_rms: float
    largest: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found right; errors: per tensor, worst first, where a checkpoint was given."""

    n_bytes: int
    n_tensors: int
    sha256: str
    has_sidecar: bool
    errors: tuple[TensorError, ...] = ()


def verify_file(path: Path, checkpoint: Path | None = None, on_progress: OnProgress | None = None) -> Verdict:
    """Check a file; GGUFError names the first thing that is wrong, CheckpointError a checkpoint that is another."""
    if not path.is_file():
        raise NotFound(f"no file to verify: {path}")
    header, sidecar = read_header(path), read_sidecar(path)
    if sidecar and sidecar.n_bytes != header.file_bytes:
        raise GGUFError(f"{path} has {header.file_bytes} bytes, its sidecar says {sidecar.n_bytes}: convert it again")
    sha256 = _check_tensors(header, sidecar, on_progress)
    if sidecar and sha256 != sidecar.sha256:
        raise GGUFError(f"{path} has sha256 {sha256}, its sidecar says {sidecar.sha256}: convert it again")
    errors = compare(header, checkpoint, on_progress) if checkpoint else ()
    return Verdict(header.file_bytes, len(header.tensors), sha256, sidecar is not None, errors)


def verdict_lines(verdict: Verdict) -> list[str]:
    """A verdict as text."""
    hashes = "as its sidecar says" if verdict.has_sidecar else "no sidecar to compare with"
    lines = [f"sound: {verdict.n_tensors} tensors, {verdict.n_bytes / 1e9:.3f} GB, every block valid"]
    lines.append(f"sha256 {verdict.sha256}, {hashes}")
    if verdict.errors:
        lines.append(f"{'tensor':32} {'type':6} {'rms error':>10} {'largest':>10}   (rms relative to the weights' own)")
    lines += [f"{e.tensor:32} {e.qtype:6} {e.relative_rms:10.5f} {e.largest:10.5f}" for e in verdict.errors]
    return lines


def _check_tensors(header: Header, sidecar: Sidecar | None, on_progress: OnProgress | None) -> str:
    """Every block of every tensor, and the hashes of the sidecar; the sha256 of the whole file."""
    whole, position = hashlib.sha256(), 0
    with header.path.open("rb", buffering=0) as file:
        for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
            whole.update(_exactly(file, tensor.offset - position))
            digest = hashlib.sha256()
            for rows in _slices(file, tensor):
                whole.update(rows.data)
                digest.update(rows.data)
                if not blocks_are_valid(tensor.qtype, rows):
                    raise GGUFError(
                        f"{header.path}: tensor {tensor.name} holds a block that is not a number: convert it again"
                    )
            position = tensor.offset + tensor.n_bytes
            if on_progress:
                on_progress(Progress(tensor.name, position, header.file_bytes))
            if sidecar and sidecar.tensors.get(tensor.name) != digest.hexdigest():
                raise GGUFError(f"{header.path}: tensor {tensor.name} is not what its sidecar says: convert it again")
        whole.update(_exactly(file, header.file_bytes - position))
    return whole.hexdigest()


def _slices(file: BinaryIO, tensor: Tensor) -> Iterator[np.ndarray]:
    """The rows of a tensor in bounded slices: (n_bytes,) uint8 each."""
    row = row_bytes(tensor.qtype, tensor.shape[0])
    step = max(1, SLICE_BYTES // row) * row
    for offset in range(0, tensor.n_bytes, step):
        file.seek(tensor.offset + offset)
        yield np.frombuffer(_exactly(file, min(step, tensor.n_bytes - offset)), np.uint8)


def _exactly(file: BinaryIO, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    view = memoryview(data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise GGUFError(f"{file.name} ended {len(view)} bytes early: convert it again")
        view = view[got:]
    return data


def compare(header: Header, checkpoint: Path, on_progress: OnProgress | None = None) -> tuple[TensorError, ...]:
    """The error of every dequantized tensor against a checkpoint's weights, worst first.

    CheckpointError where the file was not made of such a checkpoint.
    """
    plan = plan_conversion(checkpoint, _ftype_of(header), pad_ff="fourbit.n_ff" in header.metadata)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    _check_same(header, plan, tensors)
    found, done = [], 0
    for item in plan.items:
        found.append(_tensor_error(header.path, tensors[item.slot.name], item))
        done += item.tensor.n_bytes
        if on_progress:
            on_progress(Progress(item.slot.name, done, plan.source_bytes))
    return tuple(sorted(found, key=lambda error: -error.relative_rms))


def _ftype_of(header: Header) -> str:
    number = header.metadata.get("general.file_type")
    for name, mixture in MIXTURES.items():
        if mixture.number == number:
            return name
    raise CheckpointError(f"{header.path}: its general.file_type is {number!r}, which fourbit does not write")


def _check_same(header: Header, plan: Plan, tensors: dict[str, Tensor]) -> None:
    for item in plan.items:
        found = tensors.get(item.slot.name)
        if found is None or found.shape != item.slot.shape:
            shape = found.shape if found else "missing"
            raise CheckpointError(
                f"{header.path}: tensor {item.slot.name} is {shape}, the checkpoint makes it {item.slot.shape}: "
                "they do not belong together"
            )


def _tensor_error(path: Path, tensor: Tensor, item: Item) -> TensorError:
    square_error, square, largest = 0.0, 0.0, 0.0
    row = row_bytes(tensor.qtype, tensor.shape[0])
    fd = os.open(path, os.O_RDONLY)
    try:
        for first, rows in read_rows(item):
            raw = np.frombuffer(os.pread(fd, rows.shape[0] * row, tensor.offset + first * row), np.uint8)
            ours = np.empty_like(rows)
            dequantize_rows(tensor.qtype, raw, ours)
            difference = ours - rows
            square_error += float(np.vdot(difference, difference))
            square += float(np.vdot(rows, rows))
            largest = max(largest, float(np.abs(difference).max()))
    finally:
        os.close(fd)
    relative = (square_error / square) ** 0.5 if square else square_error**0.5
    return TensorError(tensor.name, tensor.qtype, relative, largest)
