"""A conversation that goes on: its messages, and the replies that became part of it.

    session = Session(engine, system="Answer in one sentence.")
    for record in session.send("Why is the sky blue?"):
        print(record.text, end="")

The engine's cache holds what was evaluated, so a new turn, a regenerated reply or an edited
question costs only the ids that are new.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine import states
from engine.chat import Message
from engine.engine import Engine, Reply
from engine.errors import ContextError, MessageError, NativeError, StateError


class Session:
    """Messages and an engine; one reply at a time. overflow: see engine/overflow.py."""

    def __init__(self, engine: Engine, *, system: str | None = None, overflow: str = "drop-oldest-turns") -> None:
        self.engine, self.overflow = engine, overflow
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def send(self, text: str, **arguments: Any) -> Iterator[Reply]:
        """Ask, and take question and reply into the conversation.

        Both are part of it however the reply ends: by itself, cancelled, or left by the caller. A
        question that cannot be asked (MessageError, ContextError) is not. arguments: see Engine.chat().
        """
        return self._ask([*self.messages, {"role": "user", "content": text}], arguments)

    def regenerate(self, **arguments: Any) -> Iterator[Reply]:
        """Another reply to the last question; MessageError when there is none."""
        return self._ask(self._asked(), arguments)

    def edit(self, text: str, **arguments: Any) -> Iterator[Reply]:
        """Ask something else in place of the last question; MessageError when there is none."""
        return self._ask([*self._asked()[:-1], {"role": "user", "content": text}], arguments)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def cancel(self) -> None:
        """End the reply that is being made, from any thread."""
        self.engine.cancel()

    def save(self) -> None:
        """Keep the conversation, and the cache that goes with it, for resume(); StateError where it cannot be."""
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(self.messages, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
        if self.engine.cache.ids:
            state = states.State(self.engine.cache.ids, self.engine.cache.save())
            states.save(path.with_suffix(".state"), self.engine.origin(), state)

    def resume(self) -> int:
        """Take up the last conversation with this model; its number of messages, 0 where there is none.

        A cache that is damaged, or of another model file or llama.cpp, is left alone: the messages are
        evaluated again.
        """
        try:
            messages = json.loads(self._path().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        self.messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        with contextlib.suppress(StateError, ContextError, NativeError):
            state = states.load(self._path().with_suffix(".state"), self.engine.origin())
            self.engine.cache.load(state.ids, state.data)
        return len(self.messages)

    def _path(self) -> Path:
        return states.states_folder() / f"chat-{self.engine.spec.key}.json"

    def _asked(self) -> list[dict[str, str]]:
        for end in range(len(self.messages), 0, -1):
            if self.messages[end - 1]["role"] == "user":
                return self.messages[:end]
        raise MessageError("there is no question yet")

    def _ask(self, asked: list[dict[str, str]], arguments: Mapping[str, Any]) -> Iterator[Reply]:
        messages: list[Message] = list(asked)
        reply = self.engine.chat(messages, **{"overflow": self.overflow, **arguments})  # errors come before any change
        return self._recorded(asked, reply)

    def _recorded(self, asked: list[dict[str, str]], reply: Iterator[Reply]) -> Iterator[Reply]:
        parts: list[str] = []
        try:
            for record in reply:
                parts.append(record.text)
                yield record
        finally:
            content = self.engine.shown("".join(parts))
            self.messages = [*asked, {"role": "assistant", "content": content}]
