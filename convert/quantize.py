"""A checkpoint to a GGUF file, in one pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import pipeline
from convert.blocks import PINNED
from convert.output_file import create, settle
from convert.pipeline import OnProgress
from convert.plan import Plan, plan_conversion, with_hashes
from convert.readback import ReadBack
from convert.shard import Shard
from convert.sidecar import Sidecar, Source
from engine.errors import OutputError
from engine.home import model_file
from engine.host import usable_cores


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was published, and what writing it took; n_resumed tensors came from an earlier run."""

    path: Path
    model: str
    ftype: str
    n_tensors: int
    n_bytes: int
    seconds_s: float
    n_resumed: int = 0


def quantize(
    folder: Path,
    out: Path | None,
    ftype: str,
    *,
    remote: Mapping[str, Shard] | None = None,
    pad_ff: bool | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Written:
    """Convert a checkpoint; out None means the model's place in the models folder.

    remote: weight files that are read from a hub instead of the folder. pad_ff: see plan_conversion().
    The bytes of every tensor equal those of llama_model_quantize on an unquantized GGUF of the
    checkpoint's own float type. An interrupted run is taken up where it stood, with the same final
    bytes. Raises CheckpointError, FetchError, NotFound, DoesNotFit or OutputError; the final name
    then holds what it held before.
    """
    start = time.perf_counter()
    plan = plan_conversion(folder, ftype, remote, pad_ff)
    path = model_file(plan.model, ftype) if out is None else out
    refuse_existing(path, overwrite)
    with create(path, plan.entries, plan.slots, plan.fingerprint) as output:
        n_resumed = len(output.finished)
        hashes = pipeline.run(plan.shards, plan.items, output, n_threads or usable_cores(), on_progress)
        entries = with_hashes(plan.entries, hashes)
        n_bytes = output.publish(entries, lambda found: _sidecar(path, plan, hashes, found))
    seconds_s = time.perf_counter() - start
    return Written(path, plan.model.key, ftype, len(plan.slots), n_bytes, seconds_s, n_resumed)


def _sidecar(path: Path, plan: Plan, hashes: Sequence[str], found: ReadBack) -> dict[str, Any]:
    version = next(entry.value for entry in plan.entries if entry.key == "fourbit.version")
    shards = zip(plan.shards, hashes, strict=True)
    sources = tuple(Source(shard.name, shard.n_bytes, sha256) for shard, sha256 in shards)
    quantizer = f"llama-cpp-python {PINNED}"
    return Sidecar(
        path.name, found.n_bytes, found.sha256, plan.model.key, plan.ftype, version, quantizer, sources, found.tensors
    ).content()


def refuse_existing(path: Path, overwrite: bool) -> None:
    """OutputError where something already has the final name and may not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file with --out")
    if path.exists() and not overwrite:
        settle(path)
        raise OutputError(f"{path} is already there: remove it, choose another name with --out, or add --force")
