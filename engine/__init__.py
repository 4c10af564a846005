"""fourbit's engine: a GGUF file and messages in, a stream of text out.

from engine import Engine

engine = Engine.open("qwen-7b-chat")
for reply in engine.chat([{"role": "user", "content": "你好"}]):
    print(reply.text, end="", flush=True)

The names below load on first use: reading models.toml or an error must not load llama.cpp.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine, Reply
    from engine.errors import FourbitError
    from engine.registry import models
    from engine.session import Session

__all__ = ["Engine", "FourbitError", "Reply", "Session", "models"]

_HOMES = {"Engine": "engine", "Reply": "engine", "Session": "session", "FourbitError": "errors", "models": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.{_HOMES[name]}"), name)
