"""The vocabulary of a GGUF file: tokens, types, scores, merges, special ids.

Reading the three tokenizer formats is in vocab_files.py; made vocabularies for replicas are here.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from convert.bpe import SPELLING
from convert.gguf_file import Entry
from engine.errors import CheckpointError
from engine.registry import Model

# token types, as sentencepiece numbers them and llama.cpp reads them
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What goes under tokenizer.ggml.*: types int32 and scores float32 have one element a token."""

    model: str
    tokens: list[bytes]
    types: np.ndarray
    special_ids: Mapping[str, int]
    add_bos: bool
    pre: str | None = None
    scores: np.ndarray | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None


@dataclass(slots=True)
class Tokens:
    """A vocabulary being built: tokens and their types side by side."""

    tokens: list[bytes] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def add(self, token: str | bytes, kind: int) -> None:
        """Append one token."""
        self.tokens.append(token.encode("utf-8") if isinstance(token, str) else token)
        self.types.append(kind)

    def pad(self, n_vocab: int) -> None:
        """Fill up to the rows of the embedding.

        CheckpointError where there are more tokens than rows, or two that are spelled alike: llama.cpp aborts on them.
        """
        if len(self.tokens) > n_vocab:
            raise CheckpointError(f"the tokenizer has {len(self.tokens)} tokens, the embedding {n_vocab} rows")
        for n in range(len(self.tokens), n_vocab):
            self.add(f"[PAD{n}]", UNUSED)
        if len(set(self.tokens)) != n_vocab:
            twice = next(token for token, count in collections.Counter(self.tokens).items() if count > 1)
            raise CheckpointError(f"the token {twice!r} occurs twice in the tokenizer: fetch it again")


def special_ids(family: str, by_name: Mapping[str, int]) -> dict[str, int]:
    """The special ids that make stock llama.cpp tools begin and stop where the authors do.

    llama.cpp ends generation at eos, eot and eom, and at some names that it knows by itself.
    """
    return {role: by_name[name] for role, name in SPECIAL_NAMES[family].items()}


SPECIAL_NAMES = {
    "qwen": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "eot": "<|im_end|>", "eom": "<|im_start|>"},
    "chatglm3": {"eos": "<eos>", "eot": "<|user|>", "eom": "<|observation|>"},
    "deepseek-llm": {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"},
}
TOKENIZERS = {"qwen": ("gpt2", "qwen2"), "chatglm3": ("llama", None), "deepseek-llm": ("gpt2", "deepseek-llm")}


def vocabulary_entries(vocabulary: Vocabulary) -> list[Entry]:
    """The tokenizer.ggml.* metadata of a vocabulary."""
    entries = [Entry("tokenizer.ggml.model", "str", vocabulary.model)]
    if vocabulary.pre:
        entries.append(Entry("tokenizer.ggml.pre", "str", vocabulary.pre))
    entries.append(Entry("tokenizer.ggml.tokens", "[str]", vocabulary.tokens))
    if vocabulary.scores is not None:
        entries.append(Entry("tokenizer.ggml.scores", "[f32]", vocabulary.scores))
    entries.append(Entry("tokenizer.ggml.token_type", "[i32]", vocabulary.types))
    if vocabulary.merges is not None:
        entries.append(Entry("tokenizer.ggml.merges", "[str]", vocabulary.merges))
    for role, number in vocabulary.special_ids.items():
        entries.append(Entry(f"tokenizer.ggml.{role}_token_id", "u32", number))
    entries.append(Entry("tokenizer.ggml.add_bos_token", "bool", vocabulary.add_bos))
    entries.append(Entry("tokenizer.ggml.add_eos_token", "bool", False))
    if vocabulary.add_space_prefix is not None:
        entries.append(Entry("tokenizer.ggml.add_space_prefix", "bool", vocabulary.add_space_prefix))
    return entries


def made_vocabulary(model: Model) -> Vocabulary:
    """A made-up vocabulary of a model's exact size for replicas: every byte reachable, controls at their ids.

    It costs what the genuine one costs to load: as many tokens, about as many merges.
    """
    kind, pre = TOKENIZERS[model.family]
    n_vocab, first_control = model.shape.n_vocab, min(i for i in model.controls.values() if i > 2)
    made = Tokens()
    if kind == "gpt2":
        merges = _made_bpe(made, first_control)
    else:
        _made_pieces(made, first_control)
    made.pad(n_vocab)
    for name, number in model.controls.items():
        made.tokens[number], made.types[number] = name.encode("utf-8"), CONTROL
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=made.tokens,
        types=np.array(made.types, np.int32),
        scores=-np.arange(n_vocab, dtype=np.float32) if kind == "llama" else None,
        merges=merges if kind == "gpt2" else None,
        special_ids=special_ids(model.family, model.controls),
        add_bos=model.family == "deepseek-llm",
        add_space_prefix=True if kind == "llama" else None,
    )


def _made_bpe(made: Tokens, count: int) -> list[str]:
    """All bytes, then all pairs of them, then pairs with one more: each with the merge that makes it."""
    for character in SPELLING:
        made.add(character, NORMAL)
    pairs = ((a, b) for a, b in itertools.product(SPELLING, SPELLING))
    triples = ((a + b, c) for a, b, c in itertools.product(SPELLING, SPELLING, SPELLING))
    merges = []
    for left, right in itertools.islice(itertools.chain(pairs, triples), count - len(SPELLING)):
        made.add(left + right, NORMAL)
        merges.append(f"{left} {right}")
    return merges


def _made_pieces(made: Tokens, count: int) -> None:
    """sentencepiece's three, the bytes, then single characters from the common scripts."""
    for name, kind in (("<unk>", UNKNOWN), ("<bos>", CONTROL), ("<eos>", CONTROL)):
        made.add(name, kind)
    for byte in range(256):
        made.add(f"<0x{byte:02X}>", BYTE)
    characters = itertools.chain("▁", map(chr, range(0x21, 0x7F)), map(chr, range(0x4E00, 0xA000)))
    words = ("▁" + chr(a) + chr(b) for a, b in itertools.product(range(0x4E00, 0x5400), range(0x4E00, 0x5400)))
    for piece in itertools.islice(itertools.chain(characters, words), count - len(made.tokens)):
        made.add(piece, NORMAL)
