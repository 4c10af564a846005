"""A checkpoint folder to a GGUF file, in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convert import pipeline
from convert.gguf_file import create
from convert.pipeline import Progress
from convert.plan import plan_conversion, with_hashes
from engine.errors import OutputError
from engine.home import model_file
from engine.host import usable_cores


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was published, and what writing it took."""

    path: Path
    model: str
    ftype: str
    n_tensors: int
    n_bytes: int
    seconds_s: float


def quantize(
    folder: Path,
    out: Path | None,
    ftype: str,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Convert a checkpoint folder; out None means the model's place in the models folder.

    The bytes of every tensor equal those of llama_model_quantize on an unquantized GGUF of the
    checkpoint's own float type. Raises CheckpointError, NotFound, DoesNotFit or OutputError; the
    final name then holds what it held before.
    """
    start = time.perf_counter()
    plan = plan_conversion(folder, ftype)
    path = model_file(plan.model, ftype) if out is None else out
    refuse_existing(path, overwrite)
    with create(path, plan.entries, plan.slots) as output:
        hashes = pipeline.run(plan.shards, plan.items, output, n_threads or usable_cores(), on_progress)
        n_bytes = output.publish(with_hashes(plan.entries, hashes))
    return Written(path, plan.model.key, ftype, len(plan.slots), n_bytes, time.perf_counter() - start)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """OutputError where something already has the final name and may not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file with --out")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is already there: remove it, choose another name with --out, or add --force")
