"""Whether llama.cpp may be given a file: what it would abort on, or read past, is refused here.

llama.cpp checks much and asserts the rest; an assertion ends the process. So a file that somebody
else made must be what its architecture says, key for key and tensor for tensor, before libllama
opens it: an unknown key of an architecture or tokenizer is refused, others are never read by it.
Vocabularies are in vocab_check.py. Sources: llama.cpp, src/llama-model.cpp, src/models/*.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.errors import GGUFError
from engine.gguf_header import ARRAY, STRING, U32, Header, Tensor
from engine.registry import Model
from engine.vocab_check import check_vocabulary

F32, BOOL = 6, 7
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
# those whose rows llama.cpp both multiplies and looks up on a CPU
WEIGHT_QTYPES = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"})
WEIGHT_QTYPES |= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's sizes as its file states them; n_ff is the width of one feed-forward branch."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int

    @property
    def n_kv(self) -> int:
        return self.n_embd // self.n_head * self.n_head_kv


Expected = Mapping[str, Callable[[Sizes], tuple[int, ...]]]  # suffix -> shape in ggml's order

_SQUARE: Callable[[Sizes], tuple[int, ...]] = lambda s: (s.n_embd, s.n_embd)  # noqa: E731
_VECTOR: Callable[[Sizes], tuple[int, ...]] = lambda s: (s.n_embd,)  # noqa: E731
OUTSIDE: Expected = {
    "token_embd.weight": lambda s: (s.n_embd, s.n_vocab),
    "output_norm.weight": _VECTOR,
    "output.weight": lambda s: (s.n_embd, s.n_vocab),
}
_NORMS: Expected = {"attn_norm.weight": _VECTOR, "ffn_norm.weight": _VECTOR, "attn_output.weight": _SQUARE}
_FUSED: Expected = {
    "attn_qkv.weight": lambda s: (s.n_embd, s.n_embd + 2 * s.n_kv),
    "attn_qkv.bias": lambda s: (s.n_embd + 2 * s.n_kv,),
}
_DOWN: Expected = {"ffn_down.weight": lambda s: (s.n_ff, s.n_embd)}
_UP: Expected = {"ffn_up.weight": lambda s: (s.n_embd, s.n_ff), "ffn_gate.weight": lambda s: (s.n_embd, s.n_ff)}
LAYERS: Mapping[str, Expected] = {
    "qwen": {**_NORMS, **_FUSED, **_UP, **_DOWN},
    "chatglm": {**_NORMS, **_FUSED, **_DOWN, "ffn_up.weight": lambda s: (s.n_embd, 2 * s.n_ff)},
    "llama": {
        **_NORMS,
        **_UP,
        **_DOWN,
        "attn_q.weight": _SQUARE,
        "attn_k.weight": lambda s: (s.n_embd, s.n_kv),
        "attn_v.weight": lambda s: (s.n_embd, s.n_kv),
    },
}
TIED = frozenset({"llama"})  # architectures that may do without output.weight
# key after the architecture -> its type
KEYS = {
    "context_length": U32,
    "embedding_length": U32,
    "block_count": U32,
    "feed_forward_length": U32,
    "attention.head_count": U32,
    "attention.head_count_kv": U32,
    "attention.key_length": U32,
    "attention.value_length": U32,
    "attention.layer_norm_rms_epsilon": F32,
    "rope.dimension_count": U32,
    "rope.freq_base": F32,
    "vocab_size": U32,
}
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
GENERAL = {"general.architecture": STRING, "general.file_type": U32, "general.quantization_version": U32}
REFUSED = ("split.", "adapter.")  # parts of something else


def check_file(header: Header, spec: Model) -> None:
    """GGUFError naming what is wrong with a file of this model, before llama.cpp sees it."""
    arch = str(header.metadata.get("general.architecture"))
    if arch != spec.arch or arch not in LAYERS:
        raise _error(header, f"its architecture is {arch[:40]!r}, that of {spec.title} is {spec.arch!r}")
    _check_keys(header, arch)
    sizes = _sizes(header, arch)
    _check_tensors(header, arch, sizes)
    check_vocabulary(header, spec, sizes.n_vocab)


def _error(header: Header, what: str) -> GGUFError:
    return GGUFError(f"{header.path}: {what}: convert the checkpoint with fourbit quantize")


def _check_keys(header: Header, arch: str) -> None:
    for key, kind in header.kinds.items():
        if key.startswith(REFUSED):
            raise _error(header, f"it has the key {key[:80]!r}, so it is no whole model")
        wanted = GENERAL.get(key)
        if key.startswith(f"{arch}."):
            wanted = KEYS.get(key.removeprefix(f"{arch}."))
            if wanted is None:
                raise _error(header, f"the key {key[:80]!r} is none that fourbit knows")
        if wanted is not None and kind != wanted:
            raise _error(header, f"the key {key[:80]!r} has value type {kind}, not {wanted}")
    for name in REQUIRED:
        if f"{arch}.{name}" not in header.metadata:
            raise _error(header, f"the key {arch}.{name} is missing")
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        value = header.metadata.get(f"{arch}.{name}", 1.0)
        if not (math.isfinite(value) and 0 < value < 1e9):
            raise _error(header, f"{arch}.{name} is {value}, not a positive number")


def _sizes(header: Header, arch: str) -> Sizes:
    n_layer = _count(header, f"{arch}.block_count", MAX_LAYERS)
    n_embd = _count(header, f"{arch}.embedding_length", 1 << 16)
    n_head = _count(header, f"{arch}.attention.head_count", 1 << 10)
    n_head_kv = _count(header, f"{arch}.attention.head_count_kv", 1 << 10, n_head)
    n_ff = _count(header, f"{arch}.feed_forward_length", 1 << 21)
    _count(header, f"{arch}.context_length", 1 << 24)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    n_vocab = getattr(tokens, "count", 0) if header.kinds.get("tokenizer.ggml.tokens") == ARRAY else 0
    if n_embd % n_head or n_head % n_head_kv or (n_embd // n_head) % 2 or not 0 < n_vocab <= 1 << 20:
        raise _error(header, f"{n_embd} values, {n_head} and {n_head_kv} heads, {n_vocab} tokens do not go together")
    head_dim = n_embd // n_head
    for name, most in (("attention.key_length", head_dim), ("attention.value_length", head_dim)):
        if _count(header, f"{arch}.{name}", most, head_dim) != head_dim:
            raise _error(header, f"{arch}.{name} is not {head_dim}")
    n_rot = _count(header, f"{arch}.rope.dimension_count", head_dim, head_dim)
    if n_rot % 2 or _count(header, f"{arch}.vocab_size", 1 << 20, n_vocab) != n_vocab:
        raise _error(header, f"its rotary width {n_rot} is odd, or its vocab_size not its {n_vocab} tokens")
    return Sizes(n_layer, n_embd, n_head, n_head_kv, n_ff // 2 if arch == "qwen" else n_ff, n_vocab)


def _count(header: Header, key: str, most: int, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise _error(header, f"{key} is {str(value)[:40]}; expected a whole number from 1 to {most}")
    return value


def _check_tensors(header: Header, arch: str, sizes: Sizes) -> None:
    expected = {name: shape(sizes) for name, shape in OUTSIDE.items()}
    for n in range(sizes.n_layer):
        expected |= {f"blk.{n}.{name}": shape(sizes) for name, shape in LAYERS[arch].items()}
    for tensor in header.tensors:
        shape = expected.pop(tensor.name, None)
        if shape is None:
            raise _error(header, f"the tensor {tensor.name!r} does not belong to the architecture {arch}")
        _check_tensor(header, tensor, shape)
    if arch in TIED:
        expected.pop("output.weight", None)
    if expected:
        raise _error(header, f"{len(expected)} tensors are missing, the first is {min(expected)}")


def _check_tensor(header: Header, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise _error(header, f"the tensor {tensor.name} has shape {tensor.shape}, its keys make it {shape}")
    is_known = tensor.qtype == "F32" if len(shape) == 1 else tensor.qtype in WEIGHT_QTYPES
    if not is_known:
        raise _error(header, f"the tensor {tensor.name} is {tensor.qtype}, which this engine does not run")
