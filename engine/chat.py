"""Messages to prompt ids: a table of parts per role (models.toml), no template language.

Control tokens go in by id; every text part is encoded on its own as ordinary text, so nothing
that a message contains can become a control token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import MessageError
from engine.registry import CONTENT, Chat, Part
from engine.vocab import Vocabulary

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids: what stays at the front, whole turns from each user message on, what asks for a reply."""

    head: list[int]
    turns: list[list[int]]
    tail: list[int]


def prompt_ids(chat: Chat, messages: Sequence[Message], vocabulary: Vocabulary) -> list[int]:
    """The ids that make the model answer the last message, nothing left out.

    A model with a default system prompt gets it where the messages bring none. MessageError says
    which message is wrong and why.
    """
    encoded = encode_turns(chat, messages, vocabulary)
    return encoded.head + [id for turn in encoded.turns for id in turn] + encoded.tail


def system_ids(chat: Chat, system: str | None, vocabulary: Vocabulary) -> list[int]:
    """The ids that every prompt with this system message begins with; none asked for is the model's own."""
    content = chat.default_system if system is None else system
    ids = _encode(chat.begin, "", vocabulary)
    return ids if content is None else ids + _encode(chat.turns["system"], content, vocabulary)


def encode_turns(chat: Chat, messages: Sequence[Message], vocabulary: Vocabulary) -> Encoded:
    """The same in its parts; MessageError as prompt_ids()."""
    turns = _checked(chat, messages)
    if chat.default_system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", chat.default_system))
    head = _encode(chat.begin, "", vocabulary)
    groups: list[list[int]] = []
    for number, (role, content) in enumerate(turns):
        ids = _encode(chat.turns[role], content, vocabulary)
        if number == 0 and role == "system":
            head += ids
        elif role == "user" or not groups:
            groups.append(ids)
        else:
            groups[-1] += ids
    return Encoded(head, groups, _encode(chat.reply, "", vocabulary))


def _encode(parts: Iterable[Part], content: str, vocabulary: Vocabulary) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if part.control is not None:
            ids.append(vocabulary.control_id(part.control))
        elif text := (part.text or "").replace(CONTENT, content):
            ids += vocabulary.encode(text)
    return ids


def _checked(chat: Chat, messages: Sequence[Message]) -> list[tuple[str, str]]:
    if not messages:
        raise MessageError("there are no messages: give at least one of role user")
    turns = [_turn(chat, number, message) for number, message in enumerate(messages, 1)]
    for number, (role, _) in enumerate(turns[1:], 2):
        if role == "system":
            raise MessageError(f"message {number} has the role system; only the first message may")
    if turns[-1][0] not in ("user", "observation"):
        raise MessageError(f"the last message has the role {turns[-1][0]}; a reply needs a last message of role user")
    return turns


def _turn(chat: Chat, number: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise MessageError(f"message {number} is not a table with exactly a role and a content")
    role, content = message["role"], message["content"]
    if role not in chat.turns:
        raise MessageError(f"message {number} has the role {role!r}; this model knows {', '.join(chat.turns)}")
    if not isinstance(content, str):
        raise MessageError(f"the content of message {number} is a {type(content).__name__}, not text")
    return role, content
