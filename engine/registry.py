"""models.toml as frozen dataclasses; an unknown or missing key is an error, so a typo cannot pass.

Knows what a model is, not where it lies (home.py) nor how it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from engine.errors import RegistryError

CONTENT = "{content}"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, in llama.cpp's terms; n_ff is the width of one feed-forward branch."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_base: float

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next id is drawn; temperature 0 is greedy, top_k 0 and top_p 1 are off, repeat_last_n -1 is all."""

    temperature: float
    top_p: float
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = -1


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a prompt: a control token by name, or text encoded on its own."""

    control: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.control is None) == (self.text is None):
            raise RegistryError("models.toml: a chat part is either {control} or {text}")


@dataclass(frozen=True, slots=True)
class Chat:
    """How messages become prompt ids: begin, one row of parts per turn by role, reply."""

    stop: tuple[str, ...]
    begin: tuple[Part, ...]
    reply: tuple[Part, ...]
    turns: Mapping[str, tuple[Part, ...]]
    normalize: str | None = None
    default_system: str | None = None
    strip_reply: bool = False
    window: int | None = None  # tokens of system and history that the authors keep below


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """llama.cpp's name for a kind of tokenizer, and for how it cuts text before merging."""

    model: str
    pre: str | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that brings a model's GGUF file."""

    name: str
    module: str
    file: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A checkpoint on a hub: owner/name, and the branch, tag or commit that is taken."""

    repo: str
    revision: str


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of models.toml."""

    key: str
    title: str
    family: str
    arch: str
    architectures: tuple[str, ...]
    sources: Mapping[str, Repository]
    tokenizer: Tokenizer
    source_qtype: str
    qtype: str
    shape: Shape
    sampling: Sampling
    chat: Chat
    controls: Mapping[str, int]
    pad_ff: bool = False
    package: Package | None = None
    sha256: Mapping[str, str] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))


@functools.cache
def models() -> Mapping[str, Model]:
    """Every model of the models.toml that ships with fourbit, by key, in its order."""
    return load(_registry_path())


def checkpoints() -> Mapping[str, Model]:
    """The models that are converted from a checkpoint, by key."""
    return {key: spec for key, spec in models().items() if spec.sources}


def model(key: str) -> Model:
    """The model of this key; RegistryError names the known ones when there is none."""
    try:
        return models()[key]
    except KeyError:
        known = ", ".join(models())
        raise RegistryError(f"no model is called {key!r}: the models are {known}") from None


def load(path: Path) -> Mapping[str, Model]:
    """The models of one TOML file; RegistryError says which key is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RegistryError(f"{path}: {error}") from error
    _only(data, {"models"}, str(path))
    return types.MappingProxyType(
        {key: _build(Model, {"key": key, **fields}, f"models.{key}") for key, fields in data.get("models", {}).items()}
    )


def _registry_path() -> Path:
    here = Path(__file__).resolve().parent
    installed = here / "models.toml"
    return installed if installed.exists() else here.parent / "models.toml"


def _only(data: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise RegistryError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RegistryError(f"{where}: expected a table, found {data!r}")
    hints = typing.get_type_hints(kind)
    _only(data, set(hints), where)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            raise RegistryError(f"{where}: key {field.name!r} is missing")
    return kind(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in data})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise RegistryError(f"{where}: expected a list, found {value!r}")
        return tuple(_value(args[0], item, where) for item in value)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise RegistryError(f"{where}: expected a table, found {value!r}")
        return types.MappingProxyType({k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()})
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    allowed = args or (hint,)
    if (nested := next((kind for kind in allowed if dataclasses.is_dataclass(kind)), None)) and isinstance(value, dict):
        return _build(typing.cast(type, nested), value, where)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise RegistryError(f"{where}: expected {names}, found {value!r}")
    return value
