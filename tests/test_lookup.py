"""Guesses and the gate that lets them through, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from engine.lookup import CREDIT_PER_ID, FIRST_CREDIT, KEY_IDS, MAX_DRAFT, Drafter, Gate, Guess


def guess(n_match: int, n_ids: int = MAX_DRAFT) -> Guess:
    return Guess(list(range(n_ids)), n_match)


def test_a_guess_is_what_followed_before():
    drafter = Drafter([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert drafter.guess(3) == Guess([4, 5, 6], 3)
    assert drafter.guess(0).ids == ()


def test_the_longest_match_counts_then_the_latest():
    assert Drafter([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).guess(1).ids == [8]
    assert Drafter([4, 1, 2, 3, 7, 5, 2, 3, 8, 4, 1, 2, 3]).guess(1) == Guess([7], 4)


def test_nothing_is_guessed_after_what_is_new():
    assert Drafter([1, 2, 3, 4]).guess(5).ids == ()
    assert Drafter([1] * (KEY_IDS - 1)).guess(5).ids == ()


def test_repetition_of_one_id():
    assert Drafter([5] * 6).guess(4).ids == [5]


@pytest.mark.parametrize("n_vocab", [2, 5, 50])
def test_guesses_are_what_a_plain_search_finds(n_vocab):
    ids = np.random.default_rng(n_vocab).integers(0, n_vocab, 300).tolist()
    for end in range(KEY_IDS + 1, len(ids)):
        found = Drafter(ids[:end]).guess(3)
        assert bool(found.ids) == any(ids[p - KEY_IDS : p] == ids[end - KEY_IDS : end] for p in range(KEY_IDS, end))
        if found.ids:
            key = ids[end - found.n_match : end] + found.ids[:1]
            assert any(ids[p : p + len(key)] == key for p in range(end - len(key) + 1))


def test_what_drafts_can_lose_is_bounded():
    gate, lost, n_plain = Gate(), 0.0, 2000
    for _ in range(n_plain):
        gate.measured(0, 1.0, 0)
        n = gate.length(guess(20))
        if n:
            gate.measured(n, 1.0 + n, 0)  # never right, and as dear as can be
            lost += n
            gate.judged(guess(20), [*range(n), n])  # and yet believed in
    assert lost <= FIRST_CREDIT + CREDIT_PER_ID * n_plain + MAX_DRAFT
    assert lost > 0


def test_the_gate_closes_when_guesses_are_wrong():
    gate = Gate()
    assert gate.length(guess(20)) > 0
    for _ in range(60):
        gate.judged(guess(20), [99])
    assert gate.length(guess(20)) == 0


def test_the_gate_opens_by_looking_on():
    gate = Gate()
    for _ in range(30):
        gate.measured(0, 1.0, 0)
        gate.judged(guess(2), [0, 1])
    assert gate.length(guess(2)) > 0


def test_the_gate_opens_wide_when_guesses_are_right_and_cheap():
    gate = Gate()
    gate.measured(0, 1.0, 0)
    for _ in range(80):
        gate.measured(MAX_DRAFT, 2.0, MAX_DRAFT)
        gate.judged(guess(20), range(MAX_DRAFT))
    assert gate.length(guess(20)) == MAX_DRAFT


def test_the_gate_keeps_to_cheap_batches():
    gate = Gate()
    gate.measured(0, 1.0, 0)
    for _ in range(20):
        gate.measured(3, 1.5, 3)
        for n in range(4, MAX_DRAFT + 1):
            gate.measured(n, 8.0, n)
        gate.judged(guess(20), range(MAX_DRAFT))
    assert gate.length(guess(20)) == 3
