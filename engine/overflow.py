"""What happens when a conversation is longer than the context: an error, or whole turns go, oldest first.

Never a silent cut: the prompt says how many turns went. The system turn and the last question stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.chat import Message, encode_turns
from engine.errors import ContextError, MessageError
from engine.registry import Chat
from engine.vocab import Vocabulary

POLICIES = ("error", "drop-oldest-turns")
LEAST_ROOM = 256  # tokens that a prompt leaves for the reply while turns can go


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to evaluate, and how many whole turns were left out of them."""

    ids: list[int]
    n_dropped: int


def fitted_prompt(
    chat: Chat, messages: Sequence[Message], vocabulary: Vocabulary, n_ctx: int, policy: str, max_tokens: int | None
) -> Prompt:
    """The prompt of a conversation within a context of n_ctx tokens.

    Dropping also keeps to the window of models that have one: the authors' code adds turns from the
    newest back as long as system and history stay below it. ContextError with both numbers where
    the last question alone does not fit, MessageError for a policy that there is none of.
    """
    if policy not in POLICIES:
        raise MessageError(f"there is no overflow policy {policy!r}: the policies are {', '.join(POLICIES)}")
    encoded = encode_turns(chat, messages, vocabulary)
    turns, last = encoded.turns[:-1], encoded.turns[-1] + encoded.tail
    kept = turns if policy == "error" else _newest(chat, encoded.head, turns, last, n_ctx, max_tokens)
    ids = encoded.head + [id for turn in kept for id in turn] + last
    if len(ids) > n_ctx:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, the context {n_ctx}: shorten it or open with more context"
        )
    return Prompt(ids, len(turns) - len(kept))


def _newest(
    chat: Chat, head: list[int], turns: list[list[int]], last: list[int], n_ctx: int, max_tokens: int | None
) -> list[list[int]]:
    """The newest turns that fit, in their order."""
    room = min(max_tokens or LEAST_ROOM, max(1, n_ctx // 4))
    n_history, first = len(head), len(turns)
    for turn in reversed(turns):
        n_history += len(turn)
        if n_history + len(last) + room > n_ctx or (chat.window is not None and n_history >= chat.window):
            break
        first -= 1
    return turns[first:]
