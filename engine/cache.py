"""The KV cache of a context, with the ids that it holds: what was evaluated once is not evaluated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine import native
from engine.errors import ContextError


class KVCache:
    """Evaluates prompts and ids; `ids` is always what the context really holds, whatever interrupted it."""

    def __init__(self, context: native.Context) -> None:
        self.context = context
        self.ids: list[int] = []

    def evaluate(self, ids: Sequence[int], go_on: Callable[[], bool] = lambda: True) -> int:
        """Bring the cache to exactly these ids, with the logits of the last; how many were there already.

        The last id is always evaluated, for its logits. go_on is asked before each batch: once it
        says no, evaluation stops with what is done. Raises as Context.decode() does.
        """
        n_reused = min(common_prefix(self.ids, ids), len(ids) - 1)
        self.truncate(n_reused)
        step = self.context.n_batch
        for start in range(n_reused, len(ids), step):
            if not go_on():
                break
            part = ids[start : start + step]
            self._decode(part, "last" if start + len(part) == len(ids) else "none")
        return n_reused

    def append(self, ids: Sequence[int], *, logits: str = "last") -> None:
        """Evaluate ids after those that are there; one batch at most."""
        self._decode(ids, logits)

    def _decode(self, ids: Sequence[int], logits: str) -> None:
        try:
            self.context.decode(ids, len(self.ids), logits=logits)
        except BaseException:  # Ctrl-C too: it may have struck after the evaluation
            self.context.truncate(len(self.ids))
            raise
        self.ids.extend(ids)

    def save(self) -> np.ndarray:
        """The cache as llama.cpp writes it; it belongs to `ids`."""
        return self.context.save_state()

    def load(self, ids: Sequence[int], data: np.ndarray) -> None:
        """Take up a cache that save() gave with these ids; empty when llama.cpp refuses it (NativeError)."""
        self.truncate(0)
        if len(ids) > self.context.n_ctx:
            raise ContextError(f"a state of {len(ids)} tokens does not fit into a context of {self.context.n_ctx}")
        self.context.load_state(data)
        self.ids = list(ids)

    def truncate(self, n_ids: int) -> None:
        """Forget everything from an id on."""
        self.context.truncate(n_ids)
        del self.ids[n_ids:]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
