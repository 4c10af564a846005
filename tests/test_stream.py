"""The stream of any ids, put together, is the decoding of all of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.text import TextDecoder
from engine.vocab import open_vocabulary
from tests.checkpoints import FAMILIES
from tests.shared import SHARED, needs_shared

WITHOUT_FIXTURE_CHECK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@given(st.lists(st.binary(max_size=7)))
def test_text_decoder_equals_decoding_at_once(pieces):
    decoder = TextDecoder()
    text = "".join([*map(decoder.decode, pieces), decoder.flush()])
    assert text == b"".join(pieces).decode("utf-8", errors="replace")


def test_text_decoder_holds_back_half_characters_only():
    decoder = TextDecoder()
    first, *rest = "好".encode()
    assert decoder.decode(b"ab" + bytes([first])) == "ab"
    assert decoder.decode(bytes(rest)) == "好"
    assert decoder.flush() == ""


def streamed(vocabulary, ids):
    stream = vocabulary.stream()
    return "".join([*map(stream.add, ids), stream.flush()])


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_of_random_ids_with_a_made_vocabulary(converted, family):
    _, vocabulary = open_vocabulary(converted(family))

    @WITHOUT_FIXTURE_CHECK
    @given(st.lists(st.integers(0, vocabulary.n_vocab - 1)))
    def check(ids):
        assert streamed(vocabulary, ids) == vocabulary.decode_bytes(ids).decode("utf-8", errors="replace")

    check()


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_of_random_ids_with_the_genuine_vocabulary(converted, family):
    _, vocabulary = open_vocabulary(converted(family, "genuine", "Q4_0"))
    lone_bytes = [id for id in range(vocabulary.n_vocab) if len(vocabulary.piece(id)) == 1]
    halves = [id for id in range(vocabulary.n_vocab) if "\ufffd" in vocabulary.decode([id])]
    longest = sorted(range(vocabulary.n_vocab), key=lambda id: -len(vocabulary.piece(id)))[:20]
    assert len(lone_bytes) >= 243  # all that UTF-8 uses
    some_id = st.one_of(st.integers(0, vocabulary.n_vocab - 1), *map(st.sampled_from, (lone_bytes, halves, longest)))

    @WITHOUT_FIXTURE_CHECK
    @given(st.lists(some_id))
    def check(ids):
        assert streamed(vocabulary, ids) == vocabulary.decode_bytes(ids).decode("utf-8", errors="replace")

    check()


@needs_shared
def test_chatglm3_decoding_equals_sentencepieces(converted):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor()
    reference.Load(str(SHARED / "tokenizers" / "chatglm3-6b" / "tokenizer.model"))
    _, vocabulary = open_vocabulary(converted("chatglm3", "genuine", "Q4_0"))
    pick = random.Random(7)
    for _ in range(300):  # 259 on: without the byte tokens, of which it gives one U+FFFD for each bad byte
        ids = [pick.randrange(259, reference.GetPieceSize()) for _ in range(pick.randrange(1, 12))]
        assert streamed(vocabulary, ids) == reference.DecodeIds(ids)
