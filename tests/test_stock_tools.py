"""Our files in stock tools: they load, and their chat template yields the ids that our engine builds."""

from __future__ import annotations

import pytest

from engine import native
from engine.chat import prompt_ids
from engine.gguf_header import read_header
from engine.vocab import open_vocabulary
from tests.checkpoints import FAMILIES

CONVERSATIONS = {
    "one question": [{"role": "user", "content": "hello people"}],
    "Chinese": [{"role": "user", "content": "你好，世界。"}],
    "three turns": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "the people"},
    ],
    "system": [{"role": "system", "content": "the world"}, {"role": "user", "content": "hello"}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", ["made", "genuine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_yields_our_ids(converted, family, tokenizer, name):
    formats = pytest.importorskip("llama_cpp.llama_chat_format")
    path = converted(family, tokenizer, "Q4_0")
    metadata = read_header(path).metadata
    bos, eos = (metadata.get(f"tokenizer.ggml.{role}_token_id", 0) for role in ("bos", "eos"))
    with native.Model(path, vocab_only=True) as model:
        render = formats.Jinja2ChatFormatter(
            template=metadata["tokenizer.chat_template"],
            bos_token=native.piece(model, bos).decode(),
            eos_token=native.piece(model, eos).decode(),
        )
        text = render(messages=CONVERSATIONS[name]).prompt
        found = native.tokenize(model, text, parse_special=True)
    spec, vocabulary = open_vocabulary(path)
    assert found == prompt_ids(spec.chat, CONVERSATIONS[name], vocabulary)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_pythons_own_class_chats(converted, family):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(converted(family, "made", "Q4_K_M")), n_ctx=128, n_threads=1, verbose=False)
    reply = llama.create_chat_completion(messages=CONVERSATIONS["one question"], max_tokens=4, temperature=0.0)
    llama.close()
    assert reply["usage"]["completion_tokens"] >= 1
