"""Which block type each tensor gets: llama.cpp's rules for its named mixtures, for dense models.

Source: llama.cpp, src/llama-quant.cpp: llama_tensor_get_type_impl, tensor_type_fallback and
tensor_allows_quantization, without the cases of other architectures, experts and importance
matrices. tests/test_identity.py holds it to what the library itself makes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Mixture:
    """A named mixture: llama.cpp's number for it and the block type that most tensors get."""

    number: int
    qtype: str

    @property
    def has_superblocks(self) -> bool:
        """Whether its blocks are the K types' of 256 values: rows of other lengths fall back to slower types."""
        return self.qtype.endswith("_K")


MIXTURES = {
    "F16": Mixture(1, "F16"),
    "Q4_0": Mixture(2, "Q4_0"),
    "Q8_0": Mixture(7, "Q8_0"),
    "Q4_K_S": Mixture(14, "Q4_K"),
    "Q4_K_M": Mixture(15, "Q4_K"),
    "Q5_K_M": Mixture(17, "Q5_K"),
    "Q6_K": Mixture(18, "Q6_K"),
    "BF16": Mixture(32, "BF16"),
}
FLOATS = ("F32", "F16", "BF16")
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
VALUE_TENSORS = ("attn_v.weight", "attn_qkv.weight")  # those that lose most by fewer bits


def choose_qtypes(ftype: str, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """The block type of each tensor of a model: names and shapes (ggml order, row length first) to names.

    The tensors must be those of a whole model: the rules count layers.
    """
    names = [name for name, _ in tensors]
    n_layer = 1 + max((layer_of(name) for name in names), default=-1)
    n_values = sum(name.endswith(VALUE_TENSORS) for name in names)
    tied = "output.weight" not in names
    chosen = {}
    i_values = i_down = 0
    for name, shape in sorted(tensors, key=lambda tensor: file_order(tensor[0])):
        index, count = (i_values, n_values) if name.endswith(VALUE_TENSORS) else (i_down, n_layer)
        chosen[name] = _qtype(ftype, name, shape, index, count, tied)
        i_values += name.endswith(VALUE_TENSORS)
        i_down += "ffn_down.weight" in name
    return {name: chosen[name] for name in names}


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama.cpp orders tensors, in its files and when it counts layers."""
    return layer_of(name), name


def layer_of(name: str) -> int:
    """The layer a tensor belongs to, -1 for those outside the layers."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is stored in blocks at all: matrices are, norms and biases are not."""
    return len(shape) > 1 and name.endswith("weight") and "_norm.weight" not in name


def _qtype(ftype: str, name: str, shape: tuple[int, ...], index: int, count: int, tied: bool) -> str:
    if not is_quantizable(name, shape):
        return "F32"
    default = MIXTURES[ftype].qtype
    if default in FLOATS:
        return default
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _fitting(_output_qtype(default, shape[0]), shape[0])
    return _fitting(_layer_qtype(ftype, name, default, index, count), shape[0])


def _output_qtype(default: str, n_per_row: int) -> str:
    if default == "Q8_0" or n_per_row % _block_size(default):
        return "Q8_0"
    return "Q6_K"


def _layer_qtype(ftype: str, name: str, default: str, index: int, count: int) -> str:
    is_value, is_down = name.endswith(VALUE_TENSORS), "ffn_down.weight" in name
    if not (is_value or is_down):
        return default
    if ftype in ("Q4_K_M", "Q5_K_M") and _deserves_more_bits(index, count):
        return "Q6_K"
    if ftype == "Q4_K_S" and index < (4 if is_value else count // 8):
        return "Q5_K"
    return default


def _deserves_more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _fitting(qtype: str, n_per_row: int) -> str:
    """The type itself, or the one that takes its place where rows are no multiple of its block."""
    if n_per_row % _block_size(qtype) == 0:
        return qtype
    smaller = FALLBACK.get(qtype, qtype)
    return smaller if n_per_row % _block_size(smaller) == 0 else "F16"


def _block_size(qtype: str) -> int:
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[qtype]][0])
