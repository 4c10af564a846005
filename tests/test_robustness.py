"""What a long day brings: a thousand chats, odd ids, odd text, prompts of a megabyte."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from engine import Engine
from engine.errors import ContextError, MessageError
from engine.registry import Sampling
from tests.checkpoints import FAMILIES
from tests.command import fourbit

GREEDY = Sampling(temperature=0.0, top_p=1.0)
DRIFT = """
import json, sys
from bench.probe import memory_split
from engine import Engine
from engine.registry import Sampling
greedy = Sampling(temperature=0.0, top_p=1.0)
with Engine.open(sys.argv[1], n_ctx=256, n_threads=1) as engine:
    def chat(n):
        messages = [{"role": "user", "content": f"hello {n} people " * (1 + n % 5)}]
        list(engine.chat(messages, sampling=greedy, max_tokens=3, lookup=bool(n % 2)))
    for n in range(100):
        chat(n)
    before = memory_split().rss_bytes
    for n in range(1000):
        chat(n)
    print(json.dumps({"before": before, "after": memory_split().rss_bytes}))
"""


@pytest.fixture(params=FAMILIES)
def engine(request, converted):
    with Engine.open(converted(request.param), n_ctx=256, n_threads=1) as opened:
        yield opened


@pytest.mark.slow
def test_a_thousand_chats_in_one_process_take_no_more_memory(converted):
    command = [sys.executable, "-c", DRIFT, str(converted("chatglm3"))]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert found["after"] <= 1.01 * found["before"], found


def test_any_id_can_be_evaluated_and_spelled(engine):
    for id in range(0, engine.vocabulary.n_vocab, 7):
        assert isinstance(engine.vocabulary.piece(id), bytes)
    engine.cache.evaluate(list(range(250)))
    engine.cache.evaluate([engine.vocabulary.n_vocab - 1])


@pytest.mark.parametrize("text", ["", " ", "\n", "\0", "a" * 300, "\u200b", "\U0010ffff", "\u0301" * 20], ids=repr)
def test_odd_messages_are_answered(engine, text):
    messages = [{"role": "user", "content": text}]
    if len(engine.prompt_ids(messages)) > engine.n_ctx:
        with pytest.raises(ContextError):
            engine.chat(messages)
    else:
        assert list(engine.chat(messages, sampling=GREEDY, max_tokens=2))


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc80\udc80"], ids=ascii)
def test_half_a_character_is_refused_with_its_place(engine, text):
    with pytest.raises(MessageError, match=r"U\+D[89A-F]"):
        engine.chat([{"role": "user", "content": text}])
    assert list(engine.chat([{"role": "user", "content": "hello"}], sampling=GREEDY, max_tokens=1))


def test_a_megabyte_is_refused_with_both_numbers(engine):
    with pytest.raises(ContextError, match=r"\d{5,} tokens, the context 256"):
        engine.chat([{"role": "user", "content": "hello people " * 80_000}])


def test_lengths_around_the_context(engine):
    for n_prompt in (254, 255, 256):
        ids = list(range(300, 300 + n_prompt))
        engine.cache.evaluate(ids)
        assert len(engine.cache.ids) == n_prompt
    with pytest.raises(ContextError, match="257 tokens do not fit"):
        engine.cache.evaluate(list(range(300, 557)))
    assert engine.cache.ids == engine.cache.ids[:256]
    assert list(engine.chat([{"role": "user", "content": "hello"}], sampling=GREEDY, max_tokens=1))


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_no_tokens_are_asked_for(engine, max_tokens):
    with pytest.raises(MessageError, match=f"max_tokens is {max_tokens}"):
        engine.chat([{"role": "user", "content": "a"}], max_tokens=max_tokens)


def test_a_context_beyond_the_training_warns_in_one_line(converted):
    result = fourbit("ask", converted("qwen"), "hello", "--ctx", 600, "--max-tokens", 1, "--threads", 1)
    assert result.returncode == 0
    assert result.stderr.startswith("fourbit: warning: a context of 600 tokens, but the model was trained for 512")


# --- a small model with real weights -------------------------------------------------------------


def test_the_real_model_talks(real_model):
    with Engine.open(real_model, n_ctx=512, n_threads=1) as engine:
        assert "Paris" in engine.ask("Name the capital of France.", sampling=GREEDY, max_tokens=30)


def test_the_real_models_prompt_is_its_templates(real_model):
    """Ids from the template's text with llama.cpp's own search for control tokens, which is right for this text."""
    from engine import native

    with Engine.open(real_model, n_ctx=128, n_threads=1) as engine:
        text = (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there!<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        )
        roles = ("system", "Be brief."), ("user", "Hi there!"), ("assistant", "Hello."), ("user", "Bye")
        messages = [{"role": role, "content": content} for role, content in roles]
        assert engine.prompt_ids(messages) == native.tokenize(engine._model, text, parse_special=True)


def test_a_chat_without_a_model_named_is_with_the_real_one(real_model):
    result = fourbit("chat", "--max-tokens", "12", "--temperature", "0", stdin="Name the capital of France.\n")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
