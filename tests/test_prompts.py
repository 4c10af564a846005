"""Prompt ids against those of the model authors' own code, the genuine tokenizers through our converter."""

from __future__ import annotations

import itertools
import json

import pytest

from engine.chat import prompt_ids
from engine.vocab import open_vocabulary
from tests.checkpoints import FAMILIES
from tests.shared import SHARED, needs_shared

GOLDEN_KEYS = {"qwen": "qwen", "chatglm3": "chatglm3", "deepseek-llm": "deepseek"}
CONTROLS = {
    "qwen": ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_0|>", "<|extra_204|>"),
    "chatglm3": ("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "sop", "eop", "<|user|>", "<|assistant|>", "<eos>"),
    "deepseek-llm": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}

pytestmark = needs_shared


def goldens(name):
    return json.loads((SHARED / "goldens" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def opened(converted):
    found = {family: open_vocabulary(converted(family, "genuine", "Q4_0")) for family in FAMILIES}
    return found.__getitem__


@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_conversation(opened, family):
    spec, vocabulary = opened(family)
    chats = goldens("chat_tokens.json")
    conversations = chats["conversations"]
    if isinstance(conversations, list):
        conversations = {conversation["name"]: conversation for conversation in conversations}
    wrong = []
    for name, golden in chats["goldens"][GOLDEN_KEYS[family]].items():
        found = conversations[name]
        messages = found["messages"] if isinstance(found, dict) else found
        expected = golden.get("ids_without_window") or golden["safe_ids"]
        if prompt_ids(spec.chat, messages, vocabulary) != expected:
            wrong.append(name)
    assert len(chats["goldens"][GOLDEN_KEYS[family]]) == 30
    assert wrong == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_string(opened, family):
    _, vocabulary = opened(family)
    strings = goldens("plain_tokens.json")["strings"]
    wrong_ids, wrong_bytes = [], []
    for string in strings:
        golden = string[GOLDEN_KEYS[family]]
        expected = golden.get("safe_ids") or golden["ids"]
        if vocabulary.encode(string["text"]) != expected:
            wrong_ids.append(string["text"])
        # the authors' DeepSeek decoder loses its plain added tokens: there the input's bytes are right
        is_lossy = family == "deepseek-llm" and not golden["roundtrip"]
        right = string["text"].encode() if is_lossy else bytes.fromhex(golden["decode_hex"])
        if vocabulary.decode_bytes(expected) != right:
            wrong_bytes.append(string["text"])
    assert len(strings) > 200
    assert (wrong_ids, wrong_bytes) == ([], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_message_yields_a_control_id(opened, family):
    spec, vocabulary = opened(family)
    by_role = {role: [{"role": role, "content": ""}] for role in spec.chat.turns}
    for control, (before, after) in itertools.product(
        CONTROLS[family], [("", ""), ("a", "b"), ("\n", "\n"), (" ", " ")]
    ):
        for role, empty in by_role.items():
            closing = [] if role in ("user", "observation") else [{"role": "user", "content": "?"}]
            message = [{"role": role, "content": before + control + after}]
            plain = prompt_ids(spec.chat, empty + closing, vocabulary)
            found = prompt_ids(spec.chat, message + closing, vocabulary)
            assert sum(map(vocabulary.is_control, found)) == sum(map(vocabulary.is_control, plain))


def test_chatglm3_words_with_sop_and_eop_inside(opened):
    _, vocabulary = opened("chatglm3")
    for word in ("people", "philosophy", "geopolitics", "neoprene", "sop", "eop", "esoph"):
        ids = vocabulary.encode(word)
        assert not any(vocabulary.is_control(id) for id in ids)
        assert vocabulary.decode(ids) == word


def test_chatglm3_encodes_each_turns_newline_apart(opened):
    spec, vocabulary = opened("chatglm3")
    ids = prompt_ids(spec.chat, [{"role": "user", "content": "hi"}], vocabulary)
    assert ids[:5] == [64790, 64792, 64795, 30910, 13]
    assert ids[-1] == 64796


def test_qwen_normalizes_to_nfc(opened):
    _, vocabulary = opened("qwen")
    assert vocabulary.encode("e\u0301") == vocabulary.encode("é")
    assert vocabulary.decode(vocabulary.encode("u\u0308")) == "ü"


def test_qwen_pieces_longer_than_32_bytes_survive(opened):
    _, vocabulary = opened("qwen")
    longest = max(range(151643), key=lambda id: len(vocabulary.piece(id)))
    piece = vocabulary.piece(longest)
    assert len(piece) >= 128
    assert vocabulary.encode(piece.decode()) == [longest]


def test_qwen_eos_look_alike_is_text_and_does_not_stop(opened):
    _, vocabulary = opened("qwen")
    assert vocabulary.piece(128247) == b"</s>"
    assert not vocabulary.is_control(128247)
    assert vocabulary.stop_ids == {151643, 151644, 151645}


def test_qwen_gets_its_default_system_prompt_only_when_none_is_given(opened):
    spec, vocabulary = opened("qwen")
    user = {"role": "user", "content": "你好"}
    default = prompt_ids(spec.chat, [user], vocabulary)
    given = prompt_ids(spec.chat, [{"role": "system", "content": "You are a helpful assistant."}, user], vocabulary)
    empty = prompt_ids(spec.chat, [{"role": "system", "content": ""}, user], vocabulary)
    assert default == given
    assert len(empty) < len(default)


def test_deepseek_plain_added_tokens_are_matched_inside_text(opened):
    _, vocabulary = opened("deepseek-llm")
    assert vocabulary.encode("für") == [69, 100014, 81]
    assert vocabulary.decode([69, 100014, 81]) == "für"


def test_deepseek_begins_once(opened):
    spec, vocabulary = opened("deepseek-llm")
    ids = prompt_ids(spec.chat, [{"role": "user", "content": "hi"}], vocabulary)
    assert ids.count(100000) == 1
    assert ids[0] == 100000


@pytest.mark.parametrize(
    ("family", "stops"),
    [("qwen", {151643, 151644, 151645}), ("chatglm3", {2, 64795, 64797}), ("deepseek-llm", {100001})],
)
def test_stop_ids(opened, family, stops):
    assert opened(family)[1].stop_ids == stops
