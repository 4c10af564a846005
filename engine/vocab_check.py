"""Whether the vocabulary of a file is one that llama.cpp can use: no two alike, every byte of text, every merge.

Source: llama.cpp, src/llama-vocab.cpp, which asserts or indexes without looking in each of these cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import GGUFError
from engine.gguf_header import ARRAY, STRING, U32, Array, Header
from engine.registry import Model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
I32, F32, BOOL = 5, 6, 7
MAX_TOKEN_BYTES = 32 << 10
PREFIX = "tokenizer."
KINDS = {
    "tokenizer.ggml.model": STRING,
    "tokenizer.ggml.pre": STRING,
    "tokenizer.ggml.tokens": ARRAY,
    "tokenizer.ggml.token_type": ARRAY,
    "tokenizer.ggml.scores": ARRAY,
    "tokenizer.ggml.merges": ARRAY,
    "tokenizer.ggml.add_bos_token": BOOL,
    "tokenizer.ggml.add_eos_token": BOOL,
    "tokenizer.ggml.add_space_prefix": BOOL,
    "tokenizer.chat_template": STRING,  # never rendered
}
IDS = {f"tokenizer.ggml.{role}_token_id": U32 for role in ("bos", "eos", "eot", "eom", "unknown", "padding")}


def spelling() -> frozenset[str]:
    """The 256 characters that byte-level vocabularies are spelled in.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return frozenset(map(chr, printable)) | frozenset(chr(256 + i) for i in range(256 - len(printable)))


# Bytes that a trained vocabulary may lack: those of no UTF-8 text or of its unused planes, and control characters.
# They spell themselves (above 0xA0) or with 256 added (below 0x21).
MAY_LACK = frozenset(map(chr, (0xC0, 0xC1, *range(0xF1, 0xF4), *range(0xF5, 0x100))))
MAY_LACK |= frozenset(chr(256 + byte) for byte in range(0x20) if byte not in b"\t\n\r")


def check_vocabulary(header: Header, spec: Model, n_vocab: int) -> None:
    """GGUFError naming what is wrong with the vocabulary of a file of this model."""
    _check_keys(header, n_vocab)
    found = (header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre"))
    if found != (spec.tokenizer.model, spec.tokenizer.pre):
        raise _error(header, f"its tokenizer is {found}, that of {spec.title} {spec.tokenizer}")
    tokens = header.strings("tokenizer.ggml.tokens")
    types = _numbers(header, "tokenizer.ggml.token_type", I32, n_vocab)
    if types.min() < NORMAL or types.max() > BYTE:
        raise _error(header, f"a token has the type {types.min()} or {types.max()}; 1 to 6 are known")
    _check_tokens(header, tokens)
    if spec.tokenizer.model == "gpt2":
        _check_bpe(header, tokens, types)
    else:
        _check_pieces(header, tokens, types)


def _error(header: Header, what: str) -> GGUFError:
    return GGUFError(f"{header.path}: {what}: convert the checkpoint with fourbit quantize")


def _check_keys(header: Header, n_vocab: int) -> None:
    for key, kind in header.kinds.items():
        if not key.startswith(PREFIX):
            continue
        wanted = KINDS.get(key, IDS.get(key))
        if wanted is None and key.startswith("tokenizer.chat_template"):
            continue  # further templates, never read
        if kind != wanted:
            raise _error(header, f"the key {key[:80]!r} with value type {kind} is none that fourbit knows")
        if key in IDS and header.metadata[key] >= n_vocab:
            raise _error(header, f"{key} is {header.metadata[key]}, there are {n_vocab} tokens")


def _numbers(header: Header, key: str, kind: int, count: int) -> np.ndarray:
    array = header.metadata.get(key)
    if not isinstance(array, Array) or array.kind != kind or array.count != count:
        raise _error(header, f"{key} is not one number for each of {count} tokens")
    return header.numbers(key)


def _check_tokens(header: Header, tokens: Sequence[bytes]) -> None:
    if len(set(tokens)) != len(tokens):
        n_twice = len(tokens) - len(set(tokens))
        raise GGUFError(
            f"{header.path}: {n_twice} of its {len(tokens)} tokens occur twice: convert or download it again"
        )
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_BYTES or not all(tokens):
        raise _error(header, f"a token has {longest} or 0 bytes; 1 to {MAX_TOKEN_BYTES} are possible")
    try:
        b"\n".join(tokens).decode("utf-8")
    except UnicodeDecodeError:
        raise _error(header, "a token is not UTF-8") from None


def _check_bpe(header: Header, tokens: Sequence[bytes], types: np.ndarray) -> None:
    """Every byte has a token, ordinary tokens are spelled in bytes, each merge makes a token."""
    alphabet, known = spelling(), set(tokens)
    missing = [character for character in alphabet - MAY_LACK if character.encode("utf-8") not in known]
    if missing:
        raise _error(header, f"{len(missing)} bytes have no token")
    ordinary = [tokens[i] for i in np.flatnonzero(types == NORMAL).tolist()]
    strange = set(b"".join(ordinary).decode("utf-8")) - alphabet
    if strange or (types == BYTE).any():
        raise _error(header, f"an ordinary token holds {min(strange, default='a byte')!r}, which spells no byte")
    for merge in header.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(b" ")
        if left not in known or right not in known or left + right not in known:
            raise _error(header, f"the merge {merge[:40]!r} joins or makes what is no token")


def _check_pieces(header: Header, tokens: Sequence[bytes], types: np.ndarray) -> None:
    """Every byte once, each spelled <0xNN>; finite scores."""
    scores = _numbers(header, "tokenizer.ggml.scores", F32, len(tokens))
    if not np.isfinite(scores).all():
        raise _error(header, "a score is not a finite number")
    spelled = sorted(tokens[i] for i in np.flatnonzero(types == BYTE).tolist())
    if spelled != sorted(b"<0x%02X>" % byte for byte in range(256)):
        raise _error(header, f"{len(spelled)} tokens stand for a byte, not <0x00> to <0xFF>")
