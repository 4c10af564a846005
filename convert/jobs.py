"""Which checkpoints there are to convert, and what becomes of each: no reading of weights, no printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.manifest import is_complete, read_manifest
from convert.output_file import settle
from engine.errors import NotFound
from engine.home import checkpoint_folder, model_file
from engine.registry import Model, checkpoints, model


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion to do, or one that was done before.

    missing: the model whose checkpoint has to be fetched first; None where the folder holds it.
    """

    folder: Path
    out: Path | None
    is_done: bool = False
    missing: Model | None = None


def jobs_in_home(keys: Sequence[str], ftype: str, overwrite: bool) -> list[Job]:
    """A job for each model named; without names, for those at hand or, when nothing is, for every model.

    Nobody who has fetched one checkpoint wants 30 GB more unasked. RegistryError for an unknown key.
    """
    if keys:
        return [_job(_convertible(key), ftype, overwrite) for key in keys]
    at_hand = [spec for spec in checkpoints().values() if _is_at_hand(spec, ftype)]
    return [_job(spec, ftype, overwrite) for spec in at_hand or checkpoints().values()]


def _convertible(key: str) -> Model:
    spec = model(key)
    if not spec.sources:
        raise NotFound(f"{spec.title} has no checkpoint to convert: its file comes ready-made")
    return spec


def _is_at_hand(spec: Model, ftype: str) -> bool:
    """Whether a model is quantized, or its checkpoint in the models folder, if only in part."""
    folder = checkpoint_folder(spec)
    return model_file(spec, ftype).is_file() or bool(read_manifest(folder)) or is_complete(folder)


def _job(spec: Model, ftype: str, overwrite: bool) -> Job:
    folder, out = checkpoint_folder(spec), model_file(spec, ftype)
    if out.is_file() and not overwrite:
        settle(out)
        return Job(folder, out, is_done=True)
    return Job(folder, out, missing=None if is_complete(folder) else spec)
