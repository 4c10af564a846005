"""models.toml: what it says of the three models, and mistakes in it."""

from __future__ import annotations

import pytest

from engine.errors import NotFound, RegistryError
from engine.home import find_model_file, home
from engine.registry import load, model, models

SHAPES = {  # layers, hidden, heads, key heads, feed-forward, vocabulary, context
    "qwen-7b-chat": (32, 4096, 32, 32, 11008, 151936, 8192),
    "chatglm3-6b": (28, 4096, 32, 2, 13696, 65024, 8192),
    "deepseek-llm-7b-chat": (30, 4096, 32, 32, 11008, 102400, 4096),
}


@pytest.mark.parametrize("key", SHAPES)
def test_official_shapes(key):
    s = model(key).shape
    assert (s.n_layer, s.n_embd, s.n_head, s.n_head_kv, s.n_ff, s.n_vocab, s.n_ctx_train) == SHAPES[key]


def test_every_control_that_a_prompt_uses_has_its_official_id():
    for spec in models().values():
        rows = [spec.chat.begin, spec.chat.reply, *spec.chat.turns.values()]
        used = {part.control for row in rows for part in row if part.control} | set(spec.chat.stop)
        assert used <= set(spec.controls)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(RegistryError, match="qwen-7b-chat, chatglm3-6b, deepseek-llm-7b-chat"):
        model("nope")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.x]\ntypo = 1", "typo"),
        ('[models.x]\ntitle = "x"', "missing"),
        ("[modles.x]", "modles"),
        ("not toml", "models.toml"),
    ],
)
def test_mistakes_are_named(tmp_path, text, words):
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(RegistryError, match=words):
        load(path)


def test_models_folder_is_where_the_environment_says(fourbit_home):
    assert home() == fourbit_home
    with pytest.raises(NotFound, match="fourbit quantize chatglm3-6b"):
        find_model_file("chatglm3-6b")
    with pytest.raises(NotFound, match="neither a file nor a model"):
        find_model_file("nothing.gguf")
