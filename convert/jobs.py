"""Which checkpoints there are to convert, and what becomes of each: no reading of weights, no printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import NotFound
from engine.home import checkpoint_folder, model_file
from engine.registry import Model, model, models


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion to do, or one that was done before: the output is there already."""

    folder: Path
    out: Path | None
    is_done: bool = False


def jobs_in_home(keys: Sequence[str], ftype: str, overwrite: bool) -> list[Job]:
    """A job for each model named, or for each whose checkpoint is in the models folder.

    NotFound says every place that was looked in and how to get a checkpoint; RegistryError for an unknown key.
    """
    specs = [model(key) for key in keys] or list(models().values())
    found = {spec.key: _job(spec, ftype, overwrite) for spec in specs}
    missing = [spec for spec in specs if found[spec.key] is None]
    if missing and (keys or len(missing) == len(specs)):
        raise NotFound(_how_to_get(missing))
    return [job for job in found.values() if job is not None]


def _job(spec: Model, ftype: str, overwrite: bool) -> Job | None:
    folder, out = checkpoint_folder(spec), model_file(spec, ftype)
    if out.is_file() and not overwrite:
        return Job(folder, out, is_done=True)
    return Job(folder, out) if (folder / "config.json").is_file() else None


def _how_to_get(missing: Sequence[Model]) -> str:
    places = ", ".join(str(checkpoint_folder(spec)) for spec in missing)
    spec = missing[0]
    command = f"modelscope download --model {spec.modelscope} --local_dir '{checkpoint_folder(spec)}'"
    return (
        f"no checkpoint to convert: there is no config.json in {places}; "
        f"get one with: {command} (.venv/bin/modelscope after make), or name a folder with --checkpoint"
    )
