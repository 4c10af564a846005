"""Drafts from the text itself: what followed the last few ids before may follow them again.

A draft costs a batch instead of single evaluations; whether that pays depends on this machine and
on this text, so the gate measures both as it goes and stops drafting when it does not. What is
drawn from each row is what the plain loop would draw there: the same text, up to ties between
logits that a batch computes with other roundings than a single evaluation does.
"""

from __future__ import annotations

from collections.abc import Sequence

KEY_IDS = 3  # ids that must have occurred before
MAX_DRAFT = 7  # beyond eight rows llama.cpp's kernels change and a batch costs several times more
PRIOR_COST = (1.0, 1.5, 2.0, 2.4, 3.0, 3.6, 4.2, 5.0)  # of a batch of n ids in single ones, until measured
SMOOTHING = 0.2  # weight of the newest measurement
LEAST_GAIN = 1.05  # expected speed of a draft over plain, below which none is made
PROBE_EVERY = 48  # plain ids after which a short draft is tried again: 2 % of the time at most


class Drafter:
    """Finds drafts in the ids seen so far: the latest place where the last KEY_IDS stood before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        """One more id of the prompt or the reply."""
        self._ids.append(id)
        end = len(self._ids) - 1  # a key's place is known once something follows it
        if end >= KEY_IDS:
            self._places[tuple(self._ids[end - KEY_IDS : end])] = end

    def draft(self, n_most: int) -> list[int]:
        """Ids that may come next, at most n_most; none where the last ones are new."""
        if n_most < 1:
            return []
        place = self._places.get(tuple(self._ids[-KEY_IDS:]))
        return [] if place is None else self._ids[place : place + n_most]


class Gate:
    """How long a draft pays: from the measured cost of batches and the share of drafted ids that were right."""

    def __init__(self) -> None:
        self._single_s = 0.0
        self._cost = list(PRIOR_COST)
        self._acceptance = 0.7
        self._n_plain = 0

    def length(self) -> int:
        """How many ids to draft now: 0 when it would not pay."""
        gain, best = max((self._gain(n), n) for n in range(1, MAX_DRAFT + 1))
        if gain >= LEAST_GAIN:
            return best
        self._n_plain += 1
        return 1 if self._n_plain % PROBE_EVERY == 0 else 0

    def _gain(self, n_draft: int) -> float:
        """Expected speed over plain: ids won by a batch of 1 + n_draft, over its cost."""
        rate = self._acceptance
        won = sum(rate**i for i in range(n_draft + 1))
        return won / self._cost[n_draft]

    def measured(self, n_rows: int, seconds: float, n_right: int) -> None:
        """A batch of n_rows took so long, and n_right of its n_rows - 1 drafted ids were right."""
        if n_rows == 1:
            self._single_s = _smoothed(self._single_s or seconds, seconds)
            return
        if self._single_s:
            cost = seconds / self._single_s
            self._cost[n_rows - 1] = _smoothed(self._cost[n_rows - 1], cost)
            for n in range(n_rows, len(self._cost)):  # a longer batch costs no less
                self._cost[n] = max(self._cost[n], self._cost[n_rows - 1])
        for i in range(min(n_right + 1, n_rows - 1)):
            self._acceptance = _smoothed(self._acceptance, 1.0 if i < n_right else 0.0)


def _smoothed(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old)
