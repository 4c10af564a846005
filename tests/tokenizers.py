"""Small made-up tokenizers in the three official file formats: every byte reachable, the official controls."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

from tests.shared import SHARED

WORDS = ("hello", " world", "people", " the", "你好", "世界", "。", "  ", "\n\n", "User", "Assistant", " für")
GENUINE = {"qwen": "qwen-7b-chat", "chatglm3": "chatglm3-6b", "deepseek-llm": "deepseek-llm-7b-chat"}
FILES = {
    "qwen": ("qwen.tiktoken",),
    "chatglm3": ("tokenizer.model",),
    "deepseek-llm": ("tokenizer.json", "tokenizer_config.json"),
}


def write_made_tokenizer(folder: Path, family: str) -> int:
    """Write a family's tokenizer files; the number of tokens, controls included."""
    return {"qwen": _write_qwen, "chatglm3": _write_chatglm3, "deepseek-llm": _write_deepseek}[family](folder)


def copy_genuine_tokenizer(folder: Path, family: str) -> None:
    """Copy the published files, from outside of the project."""
    for name in FILES[family]:
        (folder / name).write_bytes((SHARED / "tokenizers" / GENUINE[family] / name).read_bytes())


def _grown(words: tuple[str, ...]) -> list[bytes]:
    """Each word's prefixes of two bytes and more, shortest first: a merge table that makes the words."""
    found: dict[bytes, None] = {}
    for word in words:
        data = word.encode("utf-8")
        found.update(dict.fromkeys(data[:end] for end in range(2, len(data) + 1)))
    return list(found)


def _write_qwen(folder: Path) -> int:
    pieces = [bytes([byte]) for byte in range(256)] + _grown((*WORDS, "#" * 128))
    lines = [base64.b64encode(piece) + b" " + str(rank).encode() for rank, piece in enumerate(pieces)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return len(pieces) + 208


def _field(number: int, wire: int, payload: bytes) -> bytes:
    return _varint(number << 3 | wire) + payload


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _piece(text: str, score: float, kind: int) -> bytes:
    data = text.encode("utf-8")
    body = (
        _field(1, 2, _varint(len(data)) + data) + _field(2, 5, struct.pack("<f", score)) + _field(3, 0, bytes([kind]))
    )
    return _field(1, 2, _varint(len(body)) + body)


def _write_chatglm3(folder: Path) -> int:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    texts = ["▁", *map(chr, range(0x21, 0x7F)), "你", "好", "世", "界", "。"]
    grown = {word[:end].replace(" ", "▁"): None for word in WORDS for end in range(2, len(word) + 1)}
    texts += [text for text in grown if "\n" not in text]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(texts)]
    (folder / "tokenizer.model").write_bytes(b"".join(_piece(*piece) for piece in pieces))
    return len(pieces) + 9


def _write_deepseek(folder: Path) -> int:
    spelling = _spelling()
    # the bytes that UTF-8 never has are missing, as in the genuine file: their spellings are the added tokens
    tokens = [spelling[byte] for byte in range(256) if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
    merges = []
    for piece in _grown(WORDS):
        *_, last = spelled = [spelling[byte] for byte in piece]
        merges.append(f"{''.join(spelled[:-1])} {last}")
        tokens.append("".join(spelled))
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "ü", "ø")
    added = [
        {"id": len(tokens) + i, "content": name, "special": len(name) > 1, "normalized": False}
        for i, name in enumerate(names)
    ]
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges}
    document = {"version": "1.0", "added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}), encoding="utf-8")
    return len(tokens) + len(added)


def _spelling() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
