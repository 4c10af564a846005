"""Drafts from the text itself: what followed the last few ids before may follow them again.

A draft costs a batch instead of single evaluations; whether that pays depends on this machine and on
this text. The gate measures both as it goes: what batches cost, and how often a guess is right after
so many equal ids (which it learns without drafting, too). It keeps an account in units of single
evaluations, so that what drafts can lose in all is bounded. What is drawn from each row is what the
plain loop would draw there: the same text, up to ties between logits that a batch computes with
other roundings than a single evaluation does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KEY_IDS = 2  # ids that must have occurred before
MOST_PLACES = 8  # latest ones that are compared for the longest match
MOST_MATCH = 32
MAX_DRAFT = 15  # from 8 to 16 rows llama.cpp's tiled kernels cost the same, and from there on more
PRIOR_COST_STEP = 0.3  # each further id of a batch, in single evaluations, until measured
FORGET_AFTER = 200  # plain ids after which the costs of batches are taken as unknown again: a busy moment passes
PRIOR_RIGHT = {2: 0.3, 3: 0.5, 4: 0.6, 6: 0.8, 10: 0.9, 16: 0.95}  # match length: share of right guesses, until learnt
SMOOTHING = 0.15  # weight of the newest observation
LEAST_GAIN = 1.05  # expected speed of a draft over plain, below which none is made
FIRST_CREDIT, MOST_CREDIT = 1.0, 6.0  # of a reply: single evaluations that drafts may lose
HOPE = 0.5  # share of what a draft is expected to win that counts when it is risked
CREDIT_PER_ID = 0.01  # what every plain id adds: the most that drafts cost where they never pay


@dataclass(frozen=True, slots=True)
class Guess:
    """Ids that may come next, and how many before them are equal in both places."""

    ids: Sequence[int]
    n_match: int


class Drafter:
    """Finds guesses in the ids seen so far: what followed the longest match among the latest places."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        """One more id of the prompt or the reply."""
        self._ids.append(id)
        end = len(self._ids) - 1  # a key's place is known once something follows it
        if end >= KEY_IDS:
            places = self._places.setdefault(tuple(self._ids[end - KEY_IDS : end]), [])
            places.append(end)
            del places[:-MOST_PLACES]

    def guess(self, n_most: int) -> Guess:
        """At most n_most ids; none where the last ones are new."""
        places = self._places.get(tuple(self._ids[-KEY_IDS:]), [])
        if n_most < 1 or not places:
            return Guess((), 0)
        n_match, place = max((self._n_match(place), place) for place in places)
        return Guess(self._ids[place : place + n_most], n_match)

    def _n_match(self, place: int) -> int:
        ids, n = self._ids, KEY_IDS
        most = min(MOST_MATCH, place)
        while n < most and ids[place - 1 - n] == ids[-1 - n]:
            n += 1
        return n


class Gate:
    """How long a draft pays here and now."""

    def __init__(self) -> None:
        self._single_s = 0.0
        self._measured: dict[int, float] = {}  # costs by the number of drafted ids
        self._costs = _costs({})
        self._n_plain = 0
        self._right = dict(PRIOR_RIGHT)
        self._credit = FIRST_CREDIT

    def begin(self) -> None:
        """A new reply: its text is another one, the machine is the same."""
        self._credit = FIRST_CREDIT
        self._right = {bucket: (PRIOR_RIGHT[bucket] + right) / 2 for bucket, right in self._right.items()}

    def length(self, guess: Guess) -> int:
        """How many ids of a guess to draft now: 0 where it would not pay or the credit is used up."""
        best, best_gain, won, probability = 0, LEAST_GAIN, 1.0, 1.0
        for n in range(1, min(len(guess.ids), MAX_DRAFT) + 1):
            probability *= self._right[_bucket(guess.n_match + n - 1)]
            won += probability
            gain = won / self._costs[n]
            risk = self._costs[n] - 1 - HOPE * (won - 1)
            if gain > best_gain and risk <= self._credit:
                best, best_gain = n, gain
        return best

    def measured(self, n_draft: int, seconds: float, n_right: int) -> None:
        """One id and n_draft drafted ones took so long; n_right of them were right."""
        if n_draft == 0:
            self._single_s = _smoothed(self._single_s or seconds, seconds)
            self._credit = min(MOST_CREDIT, self._credit + CREDIT_PER_ID)
            self._n_plain += 1
            if self._n_plain % FORGET_AFTER == 0:
                self._measured.clear()
        elif self._single_s:
            cost = seconds / self._single_s
            self._credit = min(MOST_CREDIT, self._credit + 1 + n_right - cost)
            self._measured[n_draft] = _smoothed(self._measured.get(n_draft, cost), cost)
            self._costs = _costs(self._measured)

    def judged(self, guess: Guess, ids: Sequence[int]) -> None:
        """What really came after a guess, drafted or not."""
        for n, (guessed, came) in enumerate(zip(guess.ids, ids, strict=False)):
            bucket = _bucket(guess.n_match + n)
            self._right[bucket] = _smoothed(self._right[bucket], float(guessed == came))
            if guessed != came:
                return


def _costs(measured: Mapping[int, float]) -> list[float]:
    """Of a batch of one id and 0 to MAX_DRAFT drafted ones: on lines between those measured."""
    longest = max(measured, default=0)
    known = {0: 1.0, **measured}
    if longest < MAX_DRAFT:  # hoped for until tried, but a longer batch costs no less
        known[MAX_DRAFT] = max(1 + PRIOR_COST_STEP * MAX_DRAFT, known[longest])
    lengths = sorted(known)
    return [float(cost) for cost in np.interp(range(MAX_DRAFT + 1), lengths, [known[n] for n in lengths])]


def _bucket(n_match: int) -> int:
    return max(least for least in PRIOR_RIGHT if least <= max(n_match, KEY_IDS))


def _smoothed(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old)
