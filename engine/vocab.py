"""Text to ids and ids to bytes, by the vocabulary of one GGUF file.

Ordinary text never yields a control id; control ids are had by name only. Which ids are control
is what the file says: llama.cpp counts some ordinary pieces (Qwen's "</s>") among them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engine import native
from engine.errors import GGUFError, MessageError
from engine.gguf_check import check_file
from engine.gguf_header import Array, Header, read_header
from engine.registry import Model, models
from engine.text import TextDecoder

NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5  # tokenizer.ggml.token_type
UNKNOWN_PIECE = " ⁇ ".encode()  # as sentencepiece shows it


class Vocabulary:
    """The vocabulary of an open file, for one model of the registry."""

    def __init__(self, model: native.Model, header: Header, spec: Model) -> None:
        self._model, self._spec = model, spec
        self._types = _token_types(header, model.n_vocab)
        self._controls = _controls(model, self._types)
        self._drops_space = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", False))
        self.n_vocab = model.n_vocab
        self.stop_ids = frozenset(self.control_id(name) for name in spec.chat.stop)
        self._check(header)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, normalised as the model's authors do; MessageError for half a character."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise MessageError(f"character {error.start} of the text is U+{code:04X}, half of a character") from None
        if self._spec.chat.normalize:
            text = unicodedata.normalize(self._spec.chat.normalize, text)  # type: ignore[arg-type]
        return native.tokenize(self._model, text)

    def control_id(self, name: str) -> int:
        """The id of a control token by its name; GGUFError when the file has none of that name."""
        try:
            return self._controls[name]
        except KeyError:
            raise GGUFError(
                f"the vocabulary has no control token {name!r}: convert the checkpoint of {self._spec.title} "
                "with fourbit quantize"
            ) from None

    def is_control(self, id: int) -> bool:
        """Whether the file calls this id a control token."""
        return bool(self._types[id] == CONTROL)

    def piece(self, id: int) -> bytes:
        """The bytes that an id stands for in a reply: none for control tokens and padding."""
        kind = self._types[id]
        if kind in (CONTROL, UNUSED):
            return b""
        return UNKNOWN_PIECE if kind == UNKNOWN else native.piece(self._model, id)

    def stream(self) -> PieceStream:
        """A decoder for the ids of one reply."""
        return PieceStream(self)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, all at once."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, the space that this tokenizer puts before a text taken off again."""
        pieces = [piece for id in ids if (piece := self.piece(id))]
        if pieces:
            pieces[0] = self.without_prefix(pieces[0])
        return b"".join(pieces)

    def without_prefix(self, first: bytes) -> bytes:
        """The first piece of a text without the space that encoding prepends."""
        return first[1:] if self._drops_space and first[:1] == b" " else first

    def _check(self, header: Header) -> None:
        """GGUFError where a name has another id than the official one, or ordinary text reaches a control id."""
        for name, official in self._spec.controls.items():
            found = self.control_id(name)
            if self.n_vocab == self._spec.shape.n_vocab and found != official:
                raise GGUFError(
                    f"{header.path}: {name} has id {found}, the official vocabulary {official}: convert again"
                )
            if any(self._types[id] == CONTROL for id in self.encode(name)):
                raise GGUFError(
                    f"{header.path}: the text {name!r} yields a control token, so any message could: "
                    "convert the checkpoint with fourbit quantize"
                )


class PieceStream:
    """Ids in, text out as soon as it is certain; all of it together equals Vocabulary.decode()."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._text, self._is_first = vocabulary, TextDecoder(), True

    def add(self, id: int) -> str:
        """The text that is certain after this id."""
        piece = self._vocabulary.piece(id)
        if piece and self._is_first:
            piece, self._is_first = self._vocabulary.without_prefix(piece), False
        return self._text.decode(piece)

    def flush(self) -> str:
        """What is left at the end."""
        return self._text.flush()


def spec_of(header: Header) -> Model:
    """The registry's model that a file is of; GGUFError says what was found where it is none of them.

    Files of fourbit say so themselves; others are known by architecture and size of vocabulary.
    """
    known = models()
    key, arch = str(header.metadata.get("fourbit.model")), header.metadata.get("general.architecture")
    if key in known:
        return known[key]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    n_vocab = tokens.count if isinstance(tokens, Array) else 0
    for spec in known.values():
        if (spec.arch, spec.shape.n_vocab) == (arch, n_vocab):
            return spec
    families = ", ".join(f"{spec.title} ({spec.arch}, {spec.shape.n_vocab} tokens)" for spec in known.values())
    raise GGUFError(
        f"{header.path} is of another family: architecture {arch!r}, {n_vocab} tokens; known are {families}"
    )


def open_vocabulary(path: Path) -> tuple[Model, Vocabulary]:
    """The registry's model and the vocabulary of a file, its weights left alone."""
    header = read_header(path)
    spec = spec_of(header)
    check_file(header, spec)
    return spec, Vocabulary(native.Model(path, vocab_only=True), header, spec)


def _token_types(header: Header, n_vocab: int) -> np.ndarray:
    types = header.numbers("tokenizer.ggml.token_type")
    if len(types) != n_vocab:
        raise GGUFError(f"{header.path}: {len(types)} token types for {n_vocab} tokens")
    return types


def _controls(model: native.Model, types: np.ndarray) -> dict[str, int]:
    """Control tokens by name; there are some hundreds at most among 150,000 tokens."""
    ids = np.flatnonzero(types == CONTROL)
    return {native.piece(model, int(id)).decode("utf-8", errors="replace"): int(id) for id in ids}
