"""One line of the benchmark: what was measured of one file, and how two lines compare. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.gguf_header import Header

ALLOWANCE_BYTES = 300_000_000  # buffers, Python and libraries, beside weights and KV cache


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one file, None where not measured; `skipped` says why nothing was, `notes` what to know."""

    model: str
    key: str | None
    qtype: str
    replica: bool
    n_layer: int | None = None  # of a small replica: the layers it has, where the model has more
    skipped: str | None = None
    notes: tuple[str, ...] = ()
    file_bytes: int | None = None
    load_cold_s: float | None = None
    load_warm_s: float | None = None
    n_prompt: int | None = None
    ttft_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    n_decode: int | None = None
    decode_median_ms: float | None = None
    decode_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None
    peak_file_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    read_bytes_per_token: int | None = None
    bandwidth_share: float | None = None
    cases: Mapping[str, Any] = field(default_factory=dict)  # what each process reported, as it came

    @property
    def label(self) -> str:
        """The type, and that it is a replica if it is one: "Q4_K_M replica, 2 layers"."""
        words = self.qtype + (" replica" if self.replica else "")
        return words if self.n_layer is None else f"{words}, {self.n_layer} layers"

    @property
    def peak_share(self) -> float | None:
        """Peak RSS as a share of the predicted one."""
        return _quotient(self.peak_rss_bytes, self.predicted_peak_bytes)


RATIOS = (
    "file_bytes",
    "load_cold_s",
    "load_warm_s",
    "ttft_ms",
    "prefill_tokens_per_s",
    "decode_median_ms",
    "decode_p95_ms",
    "peak_rss_bytes",
    "peak_private_bytes",
    "peak_file_bytes",
)


def ratios(quantized: Row, fp16: Row) -> dict[str, float | None]:
    """quantized / fp16 of every figure that both have, and decode_speedup, how many times as fast it decodes."""
    found = {name: _quotient(getattr(quantized, name), getattr(fp16, name)) for name in RATIOS}
    found["decode_speedup"] = _quotient(fp16.decode_median_ms, quantized.decode_median_ms)
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model: its quantized row, its fp16 row, either None when it was not asked for."""

    model: str
    quantized: Row | None
    fp16: Row | None

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for row in (self.quantized, self.fp16) if row is not None)

    @property
    def ratios(self) -> Mapping[str, float | None]:
        return ratios(self.quantized, self.fp16) if self.quantized and self.fp16 else {}


def read_bytes_per_token(header: Header) -> int:
    """Weight bytes that one decoded token reads: every tensor, save an embedding of which one row is looked up.

    Without an output tensor the embedding is also the output matrix and read whole.
    """
    names = {tensor.name for tensor in header.tensors}
    looked_up = {"token_embd.weight"} if "output.weight" in names else set()
    return sum(tensor.n_bytes for tensor in header.tensors if tensor.name not in looked_up)


def as_json(row: Row) -> dict[str, Any]:
    """The row as JSON types."""
    return asdict(replace(row, cases=dict(row.cases)))


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
