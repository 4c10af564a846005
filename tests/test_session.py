"""The engine on small converted models: records, limits, stopping, reuse."""

from __future__ import annotations

import pytest

from engine import Engine
from engine.errors import ContextError, GGUFError, MessageError, NativeError
from engine.registry import Sampling
from tests.checkpoints import FAMILIES

GREEDY = Sampling(temperature=0.0, top_p=1.0)
HELLO = [{"role": "user", "content": "hello 你好"}]


@pytest.fixture(params=FAMILIES)
def engine(request, converted):
    with Engine.open(converted(request.param), n_ctx=256, n_threads=1) as opened:
        yield opened


def reply_of(engine, **arguments):
    return list(engine.chat(HELLO, **{"sampling": GREEDY, "max_tokens": 20} | arguments))


def test_records_count_and_end(engine):
    records = reply_of(engine)
    assert [record.finish for record in records[:-1]] == [None] * (len(records) - 1)
    assert records[-1].finish in ("stop", "length")
    assert {record.n_prompt for record in records} == {len(engine.prompt_ids(HELLO))}
    n_ids = len(records) - (records[-1].finish == "stop")
    assert records[-1].n_reply == n_ids
    assert all(record.ttft_ms > 0 for record in records)


def test_texts_together_equal_the_decoding_of_all_ids(engine):
    records = reply_of(engine, sampling=Sampling(temperature=1.5, top_p=1.0), seed=3, max_tokens=60)
    ids = [record.id for record in records]
    assert "".join(record.text for record in records) == engine.vocabulary.decode(ids)


def test_same_seed_same_reply_other_seed_another(engine):
    hot = Sampling(temperature=1.5, top_p=1.0)
    first, again, other = ([record.id for record in reply_of(engine, sampling=hot, seed=seed)] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_greedy_takes_the_likeliest_id_of_the_models_own_logits(engine):
    first = [record.id for record in reply_of(engine, max_tokens=5)]
    engine._context.truncate(0)
    engine._context.decode([*engine.prompt_ids(HELLO), *first[:-1]], 0)
    assert first[-1] == int(engine._context.logits().argmax())


def test_stops_on_a_stop_id_and_shows_nothing_of_it(engine):
    stop = min(engine.vocabulary.stop_ids)
    ids = iter([300, stop, 300])

    class Scripted:
        """Draws what the test wants."""

        def sample(self, row=-1):
            return next(ids)

    steps = engine._steps(Scripted(), engine._turn)
    assert [next(steps)[0], next(steps)[0]] == [300, stop]
    assert engine.vocabulary.piece(stop) == b""


def test_prompt_that_is_too_long_names_both_numbers(engine):
    long = [{"role": "user", "content": "hello " * 400}]
    with pytest.raises(ContextError) as error:
        engine.chat(long)
    assert str(len(engine.prompt_ids(long))) in str(error.value)
    assert "256" in str(error.value)


def test_full_context_gives_all_it_has_and_says_so(engine):
    engine.vocabulary.stop_ids = frozenset()
    n_prompt = len(engine.prompt_ids(HELLO))
    records = list(engine.chat(HELLO, sampling=GREEDY))
    assert records[-1].finish == "context"
    assert records[-1].n_reply == len(records) == 257 - n_prompt
    assert "".join(record.text for record in records) == engine.vocabulary.decode([record.id for record in records])


def test_a_reply_may_be_left_and_the_next_is_unharmed(engine):
    expected = [record.id for record in reply_of(engine)]
    abandoned = engine.chat(HELLO, sampling=GREEDY)
    next(abandoned)
    assert [record.id for record in reply_of(engine)] == expected
    with pytest.raises(MessageError, match="one reply at a time"):
        list(abandoned)


def test_ask_equals_the_shown_chat(engine):
    text = "".join(record.text for record in reply_of(engine))
    assert engine.ask("hello 你好", sampling=GREEDY, max_tokens=20) == engine.shown(text)


def test_context_beyond_the_trained_length_warns_with_both_numbers(converted):
    with pytest.warns(UserWarning, match=r"513 tokens.*512"):
        engine = Engine.open(converted("qwen"), n_ctx=513, n_threads=1)
    engine.close()
    with pytest.raises(ContextError, match="at least 1"):
        Engine.open(converted("qwen"), n_ctx=0)


def test_closed_engine_says_so(converted):
    engine = Engine.open(converted("qwen"), n_ctx=64, n_threads=1)
    engine.close()
    engine.close()
    with pytest.raises(NativeError, match="closed"):
        list(engine.chat(HELLO))


def test_penalty_counts_the_prompt(converted):
    """A penalty as strong as can be keeps greedy decoding from every id that was there before."""
    with Engine.open(converted("qwen"), n_ctx=256, n_threads=1) as engine:
        strong = Sampling(temperature=0.0, top_p=1.0, repeat_penalty=1e9)
        ids = [record.id for record in engine.chat(HELLO, sampling=strong, max_tokens=40)]
        assert len(set(ids)) == len(ids)
        assert not set(ids) & set(engine.prompt_ids(HELLO))


@pytest.mark.parametrize("kv_qtype", ["F16", "Q8_0"])
def test_kv_types(converted, kv_qtype):
    with Engine.open(converted("chatglm3"), n_ctx=128, n_threads=1, kv_qtype=kv_qtype) as engine:
        assert list(engine.chat(HELLO, max_tokens=3))


def replaced(converted, tmp_path, family, old, new):
    """A converted file with one string of its vocabulary replaced by another of the same length."""
    path = tmp_path / "x.gguf"
    data = converted(family).read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_tokens_that_llama_cpp_would_abort_on_are_refused(converted, tmp_path):
    with pytest.raises(GGUFError, match="1 of its 1280 tokens occur twice"):
        Engine.open(replaced(converted, tmp_path, "chatglm3", b"<sop>", b"hello"), n_ctx=64)
