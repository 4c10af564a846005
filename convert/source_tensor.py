"""A tensor as it lies in a shard: plain data, not yet read."""

from __future__ import annotations

from dataclasses import dataclass

from convert.shard import Shard


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Contiguous row-major bytes inside one shard; dtype in safetensors' spelling, shape in torch order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int
    n_bytes: int


DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
