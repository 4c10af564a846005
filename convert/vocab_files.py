"""The three tokenizer files, read as data: qwen.tiktoken, tokenizer.model, tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.bpe import merges_of, spell
from convert.vocab import BYTE, CONTROL, NORMAL, TOKENIZERS, UNKNOWN, USER_DEFINED, Tokens, Vocabulary, special_ids
from engine.errors import CheckpointError, NotFound

MAX_FILE_BYTES = 256 << 20
# Source: tokenization_qwen.py: these follow the ranks in this order
QWEN_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
# Source: tokenization_chatglm.py: these follow the pieces. sop and eop are plain letters there: written so, a
# merge of ordinary text reaches them ("philosophy"), whatever is asked about special tokens.
CHATGLM3_CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
CHATGLM3_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def read_vocabulary(family: str, folder: Path, n_vocab: int) -> Vocabulary:
    """The vocabulary of a checkpoint folder, padded to n_vocab tokens.

    NotFound names a missing file; CheckpointError says what is wrong with one.
    """
    name, read = READERS[family]
    path = folder / name
    try:
        data = _content(path)
        return read(data, n_vocab)
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is not a {family} tokenizer: {error}; fetch it again") from error


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise NotFound(f"no tokenizer: {path} is missing; fetch it from the model's repository")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a tokenizer has at most {MAX_FILE_BYTES}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_qwen(data: bytes, n_vocab: int) -> Vocabulary:
    """Lines of base64 and rank; ranks run from 0 without a gap, every byte has one."""
    ranks = _tiktoken_ranks(data)
    made = Tokens()
    for piece in sorted(ranks, key=ranks.__getitem__):
        made.add(spell(piece), NORMAL)
    controls = {name: len(ranks) + i for i, name in enumerate(QWEN_CONTROLS)}
    for name in controls:
        made.add(name, CONTROL)
    made.pad(n_vocab)
    return Vocabulary(
        *TOKENIZERS["qwen"][:1],
        tokens=made.tokens,
        types=np.array(made.types, np.int32),
        special_ids=special_ids("qwen", controls),
        add_bos=False,
        pre=TOKENIZERS["qwen"][1],
        merges=[f"{spell(left)} {spell(right)}" for left, right in merges_of(ranks)],
    )


def _tiktoken_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(f"line {number} is {line[:40]!r}, not a piece and its rank")
        try:
            piece = base64.b64decode(words[0], validate=True)
        except binascii.Error:
            raise ValueError(f"line {number}: {words[0][:40]!r} is not base64") from None
        if piece in ranks:
            raise ValueError(f"line {number}: the piece {piece!r} occurs twice")
        ranks[piece] = int(words[1])
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"its {len(ranks)} ranks do not run from 0 to {len(ranks) - 1}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} bytes have no piece, the first is {missing[0]}")
    return ranks


def _read_chatglm3(data: bytes, n_vocab: int) -> Vocabulary:
    """A sentencepiece model, then the controls that the authors' code adds."""
    pieces = list(_sentencepieces(data))
    if len(pieces) < 3 + 256 or sum(kind == BYTE for _, _, kind in pieces) != 256:
        raise ValueError(f"{len(pieces)} pieces, not all 256 bytes among them")
    made = Tokens()
    for piece, _, kind in pieces:
        made.add(piece, kind)
    made.tokens[:3] = [b"<unk>", b"<bos>", b"<eos>"]
    made.types[:3] = [UNKNOWN, CONTROL, CONTROL]
    controls = {name: len(pieces) + i for i, name in enumerate(CHATGLM3_CONTROLS + CHATGLM3_ROLES)}
    for name in controls:
        made.add(name, CONTROL)
    made.pad(n_vocab)
    scores = np.zeros(n_vocab, np.float32)
    scores[: len(pieces)] = [score for _, score, _ in pieces]
    return Vocabulary(
        TOKENIZERS["chatglm3"][0],
        tokens=made.tokens,
        types=np.array(made.types, np.int32),
        special_ids=special_ids("chatglm3", {"<eos>": 2, **controls}),
        add_bos=False,
        scores=scores,
        add_space_prefix=True,
    )


def _sentencepieces(data: bytes) -> Iterator[tuple[bytes, float, int]]:
    """Piece, score and type of each SentencePiece message.

    Source: sentencepiece_model.proto: ModelProto.pieces is field 1; in it piece 1, score 2, type 3.
    """
    for number, value in _protobuf_fields(data):
        if number == 1:
            fields = dict(_protobuf_fields(value))
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            kind = fields.get(3, NORMAL)
            if kind not in range(1, 7):
                raise ValueError(f"the piece {fields.get(1)!r} has the unknown type {kind}")
            piece = fields.get(1, b"")
            piece.decode("utf-8")
            yield piece, score, kind


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one message: bytes, or an int for a varint.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {offset} is not one of protobuf's")
        length = {1: 8, 5: 4}.get(wire)
        if length is None:
            length, offset = _varint(data, offset)
        if offset + length > len(data):
            raise ValueError(f"it is truncated: byte {offset + length} is needed, there are {len(data)}")
        yield number, data[offset : offset + length]
        offset += length


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while offset < len(data) and shift < 70:
        byte = data[offset]
        value, shift, offset = value | (byte & 0x7F) << shift, shift + 7, offset + 1
        if byte < 0x80:
            return value, offset
    raise ValueError(f"it is truncated or damaged at byte {offset}")


def _read_deepseek(data: bytes, n_vocab: int) -> Vocabulary:
    """A tokenizers file: a byte-level BPE model, then added tokens, some of them plain text."""
    document = json.loads(data)
    model, added = document["model"], document["added_tokens"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']!r}, not 'BPE'")
    by_id = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    for token in added:
        by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"its {len(by_id)} ids do not run from 0 to {len(by_id) - 1}")
    made = Tokens()
    for number in range(len(by_id)):
        made.add(*by_id[number])
    controls = {token["content"]: token["id"] for token in added if token["special"]}
    made.pad(n_vocab)
    return Vocabulary(
        TOKENIZERS["deepseek-llm"][0],
        tokens=made.tokens,
        types=np.array(made.types, np.int32),
        special_ids=special_ids("deepseek-llm", controls),
        add_bos=True,
        pre=TOKENIZERS["deepseek-llm"][1],
        merges=[_merge(item, model["vocab"]) for item in model["merges"]],
    )


def _merge(item: Any, vocab: dict[str, int]) -> str:
    """A merge as "left right": the file has it so, or as a list of two."""
    left, right = item.split(" ") if isinstance(item, str) else item
    if left + right not in vocab:
        raise ValueError(f"the merge of {left!r} and {right!r} makes no token")
    return f"{left} {right}"


READERS = {
    "qwen": ("qwen.tiktoken", _read_qwen),
    "chatglm3": ("tokenizer.model", _read_chatglm3),
    "deepseek-llm": ("tokenizer.json", _read_deepseek),
}
