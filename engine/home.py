"""Where checkpoints and models lie on this machine.

$FOURBIT_HOME/                       default: the user's cache directory
    checkpoints/qwen-7b-chat/        config.json, shards, tokenizer
    models/qwen-7b-chat-Q4_K_M.gguf  what `fourbit quantize` writes
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import platformdirs

from engine.errors import NotFound
from engine.registry import Model, Package, model, models


def home() -> Path:
    """The models folder: FOURBIT_HOME, or `fourbit` under the user's cache directory."""
    chosen = os.environ.get("FOURBIT_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("fourbit"))


def checkpoint_folder(spec: Model) -> Path:
    """Where the checkpoint of a model is looked for."""
    return home() / "checkpoints" / spec.key


def model_file(spec: Model, qtype: str) -> Path:
    """Where the GGUF of a model and type is written and looked for."""
    return home() / "models" / f"{spec.key}-{qtype}.gguf"


def quantized_files(spec: Model) -> list[Path]:
    """The GGUF files of a model that are there, of whatever type."""
    return sorted((home() / "models").glob(f"{spec.key}-*.gguf"))


def find_model_file(path_or_model: str | Path, qtype: str | None = None) -> Path:
    """The GGUF that a path or a key of models.toml names; NotFound says where it was looked for."""
    name = str(path_or_model)
    if name in models():
        spec = model(name)
        path = model_file(spec, qtype or spec.qtype)
        if path.is_file():
            return path
        if spec.package:
            return _packaged(spec, spec.package)
        raise NotFound(f"{spec.title} is not quantized yet: no {path}; make it with: fourbit quantize {name}")
    path = Path(path_or_model)
    if path.is_file():
        return path
    known = ", ".join(models())
    raise NotFound(f"{name!r} is neither a file nor a model; the models are {known}")


def _packaged(spec: Model, package: Package) -> Path:
    """The file that an installed package brings; nothing of the package is imported."""
    found = importlib.util.find_spec(package.module)
    for place in (found.submodule_search_locations or ()) if found else ():
        path = Path(place) / package.file
        if path.is_file():
            return path
    raise NotFound(f"{spec.title} comes with the package {package.name}: make demo, or pip install {package.name}")
