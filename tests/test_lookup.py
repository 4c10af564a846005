"""Drafts and the gate that lets them through, without a model."""

from __future__ import annotations

from engine.lookup import KEY_IDS, MAX_DRAFT, PROBE_EVERY, Drafter, Gate


def test_a_draft_is_what_followed_before():
    drafter = Drafter([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert drafter.draft(3) == [4, 5, 6]
    assert drafter.draft(0) == []


def test_the_latest_occurrence_counts():
    drafter = Drafter([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3])
    assert drafter.draft(1) == [8]


def test_nothing_is_drafted_after_what_is_new():
    assert Drafter([1, 2, 3, 4]).draft(5) == []
    assert Drafter([1] * (KEY_IDS - 1)).draft(5) == []


def test_repetition_of_one_id():
    assert Drafter([5] * 6).draft(4) == [5]


def test_the_gate_closes_when_drafts_are_wrong_and_probes_now_and_then():
    gate = Gate()
    assert gate.length() > 0
    for _ in range(60):
        gate.measured(4, 2.4, 0)
    lengths = [gate.length() for _ in range(10 * PROBE_EVERY)]
    assert sum(length > 0 for length in lengths) == 10
    assert set(lengths) == {0, 1}


def test_the_gate_opens_wide_when_drafts_are_right_and_cheap():
    gate = Gate()
    gate.measured(1, 1.0, 0)
    for _ in range(80):
        gate.measured(8, 2.0, 7)
    assert gate.length() == MAX_DRAFT


def test_the_gate_keeps_to_cheap_batches():
    gate = Gate()
    gate.measured(1, 1.0, 0)
    for _ in range(80):
        gate.measured(4, 1.5, 3)
        gate.measured(8, 8.0, 7)
    assert 1 <= gate.length() <= 4
