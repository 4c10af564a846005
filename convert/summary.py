"""What a GGUF file holds, in few numbers: for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.gguf_header import Array, Header, read_header


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors of one type: how many, values and bytes."""

    qtype: str
    n_tensors: int
    n_values: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A file's header in brief; bits per weight counts tensor bytes only."""

    path: Path
    file_bytes: int
    version: int
    metadata: Mapping[str, Any]
    shares: tuple[Share, ...]
    n_values: int
    bits_per_weight: float


def summarize(path: Path) -> Summary:
    """The summary of a GGUF file; GGUFError when it is none."""
    header = read_header(path)
    shares = tuple(_share(header, qtype) for qtype in sorted({t.qtype for t in header.tensors}))
    n_values = sum(share.n_values for share in shares)
    n_bytes = sum(share.n_bytes for share in shares)
    metadata = {key: _brief(value) for key, value in header.metadata.items()}
    bits = 8 * n_bytes / n_values if n_values else 0.0
    return Summary(path, header.file_bytes, header.version, metadata, shares, n_values, bits)


def tensor_lines(path: Path) -> list[str]:
    """One line a tensor: name, type, shape in ggml's order, bytes."""
    return [
        f"{t.name:32} {t.qtype:5} {' x '.join(map(str, t.shape)):>16} {t.n_bytes:>13,}"
        for t in read_header(path).tensors
    ]


def summary_lines(summary: Summary) -> list[str]:
    """The summary as text."""
    lines = [f"{summary.path}: GGUF {summary.version}, {summary.file_bytes / 1e9:.3f} GB"]
    lines.append(f"{summary.n_values / 1e9:.3f} billion weights, {summary.bits_per_weight:.2f} bits each")
    lines += [f"  {s.qtype:5} {s.n_tensors:4} tensors {s.n_bytes / 1e9:8.3f} GB" for s in summary.shares]
    for key, value in summary.metadata.items():
        text = str(value).replace("\n", "\\n")
        lines.append(f"{key} = {text if len(text) <= 80 else text[:77] + '...'}")
    return lines


def _share(header: Header, qtype: str) -> Share:
    tensors = [t for t in header.tensors if t.qtype == qtype]
    n_values = sum(math.prod(t.shape) for t in tensors)
    return Share(qtype, len(tensors), n_values, sum(t.n_bytes for t in tensors))


def _brief(value: Any) -> Any:
    return f"[{value.count} elements]" if isinstance(value, Array) else value
