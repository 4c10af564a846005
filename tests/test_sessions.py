"""Conversations that go on: what is reused, dropped, cancelled, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import threading

import numpy as np
import pytest

from engine import Engine, Session, states
from engine.errors import ContextError, MessageError, StateError
from engine.overflow import fitted_prompt
from engine.registry import Sampling
from tests.checkpoints import FAMILIES
from tests.shared import SHARED, needs_shared

GREEDY = Sampling(temperature=0.0, top_p=1.0)
OPTIONS = {"sampling": GREEDY, "max_tokens": 12}


@pytest.fixture(params=FAMILIES)
def path(request, converted):
    return converted(request.param)


@pytest.fixture
def engine(path, fourbit_home):
    with Engine.open(path, n_ctx=256, n_threads=1) as opened:
        yield opened


def text_of(records):
    return "".join(record.text for record in records)


def assert_as_if_fresh(engine, path, messages):
    """What the session's cache makes of a prompt is what an engine makes of it that never saw anything."""
    ids = engine.prompt_ids(messages)
    engine.cache.evaluate(ids)
    found = engine._context.logits().copy()
    with Engine.open(path, n_ctx=engine.n_ctx, n_threads=1) as other:
        other.cache.evaluate(ids)
        expected = other._context.logits().copy()
    assert engine.cache.ids == ids
    assert np.abs(found - expected).max() < 0.05 * expected.std()


def test_a_second_turn_evaluates_only_what_is_new(engine, path):
    session = Session(engine)
    first = list(session.send("hello", **OPTIONS))
    assert first[0].n_reused == 0
    messages = [*session.messages, {"role": "user", "content": "people"}]
    second = list(session.send("people", **OPTIONS))
    assert second[0].n_reused >= first[0].n_prompt - 1
    assert second[0].n_evaluated < second[0].n_prompt
    assert second[0].n_prompt == len(engine.prompt_ids(messages))
    assert_as_if_fresh(engine, path, messages)


def test_regenerate_evaluates_one_id(engine):
    session = Session(engine)
    first = list(session.send("hello", **OPTIONS))
    again = list(session.regenerate(**OPTIONS))
    assert again[0].n_evaluated == 1
    assert len(again) == len(first)
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_edit_reuses_what_stands_before(engine, path):
    session = Session(engine, system="people and the world")
    list(session.send("hello", **OPTIONS))
    list(session.send("hello again", **OPTIONS))
    edited = list(session.edit("the world", **OPTIONS))
    assert edited[0].n_reused > 5
    asked = session.messages[:-1]
    assert asked[-1]["content"] == "the world"
    assert_as_if_fresh(engine, path, asked)


def test_regenerate_of_nothing_is_said(engine):
    with pytest.raises(MessageError, match="no question"):
        Session(engine).regenerate()


@pytest.mark.parametrize("n_records", [1, 4])
def test_a_reply_that_is_left_leaves_a_consistent_session(engine, path, n_records):
    session = Session(engine)
    reply = session.send("hello", **OPTIONS)
    got = [next(reply) for _ in range(n_records)]
    reply.close()
    assert session.messages[-1] == {"role": "assistant", "content": engine.shown(text_of(got))}
    messages = [*session.messages, {"role": "user", "content": "people"}]
    list(session.send("people", **OPTIONS))
    assert_as_if_fresh(engine, path, messages)


def test_cancelling_during_a_reply(engine, path):
    session = Session(engine)
    records = []
    for record in session.send("hello", sampling=GREEDY, max_tokens=100):
        records.append(record)
        if len(records) == 3:
            threading.Thread(target=session.cancel).start()
            while not engine._is_cancelled:
                pass
    assert records[-1].finish == "cancelled"
    assert len(records) == 4
    messages = [*session.messages, {"role": "user", "content": "people"}]
    list(session.send("people", **OPTIONS))
    assert_as_if_fresh(engine, path, messages)


def test_cancelling_during_the_prompt(path, fourbit_home, monkeypatch):
    with Engine.open(path, n_ctx=512, n_threads=1, n_batch=32) as engine:
        decode, calls = engine._context.decode, []

        def counted(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                engine.cancel()
            return decode(*arguments, **options)

        monkeypatch.setattr(engine._context, "decode", counted)
        session = Session(engine)
        records = list(session.send("x" * 200, **OPTIONS))
        assert [record.finish for record in records] == ["cancelled"]
        assert len(calls) == 2
        assert len(engine.cache.ids) == 64
        again = list(session.regenerate(**OPTIONS))
        assert again[0].n_reused == 64


def test_ctrl_c_inside_an_evaluation_leaves_cache_and_ids_alike(engine, path, monkeypatch):
    decode = engine._context.decode

    def interrupted(*arguments, **options):
        decode(*arguments, **options)
        raise KeyboardInterrupt

    session = Session(engine)
    list(session.send("hello", **OPTIONS))
    before = list(engine.cache.ids)
    monkeypatch.setattr(engine._context, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.send("people", **OPTIONS))
    monkeypatch.undo()
    assert engine.cache.ids == before[: len(engine.cache.ids)]
    asked = session.messages[:-1]
    list(session.regenerate(**OPTIONS))
    assert_as_if_fresh(engine, path, asked)


# --- overflow ------------------------------------------------------------------------------------


def long_chat(engine, n_ctx):
    messages, n = [{"role": "system", "content": "the world"}], 0
    while len(engine.prompt_ids([*messages, {"role": "user", "content": "q"}])) < 2 * n_ctx:
        messages += [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
        n += 1
    return [*messages, {"role": "user", "content": "the last"}], n


def test_error_names_both_numbers(engine):
    messages, _ = long_chat(engine, 256)
    n_ids = len(engine.prompt_ids(messages))
    with pytest.raises(ContextError, match=f"{n_ids} tokens, the context 256"):
        engine.chat(messages, overflow="error")


def test_dropping_takes_whole_turns_and_keeps_the_system_message(engine):
    messages, n_turns = long_chat(engine, 256)
    records = list(engine.chat(messages, overflow="drop-oldest-turns", **OPTIONS))
    n_dropped = records[-1].n_dropped
    assert 0 < n_dropped < n_turns
    kept = [messages[0], *messages[1 + 2 * n_dropped :]]
    assert records[-1].n_prompt == len(engine.prompt_ids(kept))
    assert records[-1].finish in ("stop", "length")
    one_more = [messages[0], *messages[1 + 2 * (n_dropped - 1) :]]
    assert len(engine.prompt_ids(one_more)) + OPTIONS["max_tokens"] > 256


def test_a_last_question_that_is_too_long_is_an_error_under_every_policy(engine):
    messages = [{"role": "user", "content": "x " * 400}]
    for policy in ("error", "drop-oldest-turns"):
        with pytest.raises(ContextError, match="the context 256"):
            engine.chat(messages, overflow=policy)


def test_an_unknown_policy(engine):
    with pytest.raises(MessageError, match="shift"):
        engine.chat([{"role": "user", "content": "a"}], overflow="shift")


def test_a_full_context_ends_the_reply_and_says_so(path, fourbit_home):
    with Engine.open(path, n_ctx=64, n_threads=1) as engine:
        never = Sampling(temperature=0.0, top_p=1.0)
        records = list(engine.chat([{"role": "user", "content": "hello"}], sampling=never))
        last = records[-1]
        assert last.finish in ("context", "stop")
        if last.finish == "context":
            assert last.n_prompt + last.n_reply == 64 + 1


@needs_shared
def test_qwens_window_is_the_authors(converted):
    """The prompt of their make_context, which leaves out what goes beyond 6144 tokens of history."""
    from engine.vocab import open_vocabulary

    goldens = json.loads((SHARED / "goldens" / "chat_tokens.json").read_text(encoding="utf-8"))
    spec, vocabulary = open_vocabulary(converted("qwen", "genuine", "Q4_0"))
    messages = {case["name"]: case["messages"] for case in goldens["conversations"]}
    found = goldens["goldens"]["qwen"]
    for name, golden in found.items():
        prompt = fitted_prompt(spec.chat, messages[name], vocabulary, 8192, "drop-oldest-turns", None)
        assert prompt.ids == golden["safe_ids"]
        assert prompt.n_dropped == golden["history_turns_dropped"]
    assert any(golden["history_turns_dropped"] for golden in found.values())


# --- states --------------------------------------------------------------------------------------


def test_a_system_prompt_is_evaluated_once(path, fourbit_home):
    messages = [{"role": "system", "content": "people " * 20}, {"role": "user", "content": "hello"}]
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        expected = text_of(engine.chat(messages, **OPTIONS))
        engine.cache.truncate(0)
        n_ids = engine.cache_prefix(messages[0]["content"])
        assert n_ids > 20
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        calls = []
        engine.cache.evaluate = lambda *a, **k: calls.append(a)
        engine.cache_prefix(messages[0]["content"])
        del engine.cache.evaluate
        assert calls == []
        records = list(engine.chat(messages, **OPTIONS))
        assert records[0].n_reused == n_ids
        assert text_of(records) == expected


def the_state(engine):
    engine.cache_prefix("people " * 20)
    return next(states.states_folder().glob("prefix-*.state"))


def spoil_version(data):
    return data.replace(b'"version": 1', b'"version": 2')


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


SPOILED = {
    "cut at the end": lambda d: d[:-1],
    "cut in the middle": lambda d: d[: len(d) // 2],
    "cut in the header": lambda d: d[:20],
    "empty": lambda d: b"",
    "longer": lambda d: d + b"x",
    "another magic": lambda d: b"5" + d[1:],
    "a flipped bit in the state": lambda d: flip(d, len(d) - 100),
    "a flipped bit in the ids": lambda d: flip(d, d.index(b"}") + 8),
    "a huge header": lambda d: d[:8] + struct.pack("<I", 0xFFFFFFFF) + d[12:],
    "another version": spoil_version,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_state_is_refused_and_the_prompt_evaluated(engine, name):
    path = the_state(engine)
    good = path.read_bytes()
    bad = SPOILED[name](good)
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(StateError):
        states.load(path, engine.origin())
    engine.cache.truncate(0)
    engine.cache_prefix("people " * 20)
    assert path.read_bytes() == good
    assert states.load(path, engine.origin()).ids == engine.cache.ids


OTHERS = [("model_sha256", "0" * 64), ("llama_cpp", "0.3.0"), ("kv_qtype", "Q8_0"), ("flash_attention", "on")]


@pytest.mark.parametrize(("field", "value"), OTHERS)
def test_a_state_of_something_else_is_refused(engine, field, value):
    path = the_state(engine)
    with pytest.raises(StateError, match=field.split("_")[0]):
        states.load(path, dataclasses.replace(engine.origin(), **{field: value}))


def test_states_are_capped_the_longest_unused_go(tmp_path):
    origin = states.Origin("a" * 64, "x", "F16", "auto", 10)
    state = states.State([1, 2, 3], np.full(1000, 7, np.uint8))
    for n in range(6):
        states.save(tmp_path / f"prefix-{n}.state", origin, state, cap_bytes=4000)
        os.utime(tmp_path / f"prefix-{n}.state", (n, n))
    left = sorted(path.name for path in tmp_path.glob("*.state"))
    assert left == ["prefix-3.state", "prefix-4.state", "prefix-5.state"]
    found = states.load(tmp_path / "prefix-5.state", origin)
    assert (found.ids, found.data.tobytes()) == (state.ids, state.data.tobytes())
    assert not list(tmp_path.glob(".*"))


def test_a_chat_goes_on_after_a_restart(path, fourbit_home):
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        session = Session(engine, system="the world")
        list(session.send("hello", **OPTIONS))
        messages = list(session.messages)
        session.save()
        expected = text_of(session.send("people", **OPTIONS))
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        session = Session(engine)
        assert session.resume() == 3
        assert session.messages == messages
        records = list(session.send("people", **OPTIONS))
        assert records[0].n_reused > 10
        assert text_of(records) == expected


def test_a_chat_whose_state_is_spoiled_goes_on_without_it(path, fourbit_home):
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        session = Session(engine)
        list(session.send("hello", **OPTIONS))
        session.save()
        expected = text_of(session.send("people", **OPTIONS))
    state = next(states.states_folder().glob("chat-*.state"))
    state.write_bytes(state.read_bytes()[:-9])
    with Engine.open(path, n_ctx=256, n_threads=1) as engine:
        session = Session(engine)
        assert session.resume() == 2
        records = list(session.send("people", **OPTIONS))
        assert records[0].n_reused == 0
        assert text_of(records) == expected


# --- lookup --------------------------------------------------------------------------------------


DRAWN = Sampling(temperature=0.7, top_p=0.9, repeat_penalty=1.05)
QUOTING = (
    "Repeat this text word for word: The river rises in the northern hills and flows past four towns. "
    "The river rises in the northern hills, and nobody knows why. Now repeat it once more."
)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_lookup_gives_the_same_ids(real_model, sampling):
    """On real text, each in a fresh engine: a prompt evaluated in one batch or in two rounds otherwise."""
    found = {}
    for lookup in (False, True):
        with Engine.open(real_model, n_ctx=512, n_threads=1) as engine:
            messages = [{"role": "user", "content": QUOTING}]
            found[lookup] = [
                r.id for r in engine.chat(messages, sampling=sampling, seed=5, max_tokens=100, lookup=lookup)
            ]
            held = engine.cache.ids[len(engine.prompt_ids(messages)) :]
    assert found[True] == found[False]
    assert held == found[True][: len(held)]
    assert len(held) >= len(found[True]) - 1


def test_lookup_stops_at_the_context(path, fourbit_home):
    with Engine.open(path, n_ctx=80, n_threads=1) as engine:
        records = list(engine.chat([{"role": "user", "content": "a a a a a a"}], sampling=GREEDY, lookup=True))
        assert records[-1].finish in ("context", "stop")
        assert len(engine.cache.ids) <= 80
