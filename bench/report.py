"""Numbers as text: the machine's card, a table for the terminal, Markdown, one JSON object. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.machine import Card
from bench.row import Comparison, Row, as_json

MIB = 1 << 20
ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run of the benchmark found."""

    command: str
    card: Card
    comparisons: tuple[Comparison, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its two head lines, the Row attribute that it shows, its scale and format."""

    above: str
    below: str
    name: str
    scale: float = 1.0
    form: str = ".0f"

    def cell(self, row: Row) -> str:
        value = getattr(row, self.name)
        return ABSENT if value is None else format(value / self.scale, self.form)


COLUMNS = (
    Column("file", "GB", "file_bytes", 1e9, ".2f"),
    Column("load", "cold s", "load_cold_s", 1, ".2f"),
    Column("load", "warm s", "load_warm_s", 1, ".2f"),
    Column("TTFT", "ms", "ttft_ms"),
    Column("prefill", "tok/s", "prefill_tokens_per_s", 1, ".1f"),
    Column("decode", "ms/tok", "decode_median_ms", 1, ".1f"),
    Column("decode", "p95 ms", "decode_p95_ms", 1, ".1f"),
    Column("RSS", "MiB", "peak_rss_bytes", MIB),
    Column("private", "MiB", "peak_private_bytes", MIB),
    Column("mapped", "MiB", "peak_file_bytes", MIB),
    Column("RSS of", "forecast", "peak_share", 1, ".0%"),
    Column("share of", "read bw", "bandwidth_share", 1, ".0%"),
)


def card_lines(card: Card) -> list[str]:
    """The card: what the numbers were measured on."""
    limit = "" if card.memory_limit_bytes is None else f", limited to {card.memory_limit_bytes / 1e9:.1f} GB"
    return [
        f"CPU        {card.cpu}, {card.n_threads} of {card.n_physical_cores} physical cores used",
        f"memory     {card.memory_total_bytes / 1e9:.1f} GB, {card.memory_available_bytes / 1e9:.1f} GB available"
        f"{limit}; all cores read {card.read_bytes_per_s / 1e9:.1f} GB/s",
        f"llama.cpp  llama-cpp-python {card.llama_cpp_python}: {card.llama_flags}",
        f"set-up     OMP_WAIT_POLICY={card.omp_wait_policy}, Python {card.python}, fourbit {card.fourbit}",
        f"date       {card.date}",
    ]


def table_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The terminal's table: per model the quantized row, the fp16 row and their ratio; notes below."""
    grid = [["", *(c.above for c in COLUMNS)], ["", *(c.below for c in COLUMNS)]]
    grid += [cells for comparison in comparisons for cells in _block(comparison)]
    widths = [max(len(row[i]) for row in grid if len(row) > 1) for i in range(len(COLUMNS) + 1)]
    lines = [_aligned(row, widths) for row in grid]
    return [*lines, *_legend(comparisons)]


def markdown(report: Report) -> str:
    """The report for a README: card, table, notes."""
    heads = ["model", "type", *(f"{c.above} {c.below}" for c in COLUMNS)]
    rules = ["---", "---", *("---:" for _ in COLUMNS)]
    lines = [f"`{report.command}`, {report.card.date}, {report.seconds / 60:.1f} minutes", ""]
    lines += [f"    {line}" for line in card_lines(report.card)]
    lines += ["", _piped(heads), _piped(rules)]
    for comparison in report.comparisons:
        lines += [_piped([comparison.model, *cells]) for cells in _cells(comparison)]
    lines += ["", *(f"- {line.strip()}" for line in _legend(report.comparisons) if line.strip())]
    return "\n".join(lines) + "\n"


def json_object(report: Report) -> dict[str, Any]:
    """The report as JSON types: machine, rows, ratios by model."""
    return {
        "fourbit": report.card.fourbit,
        "command": report.command,
        "seconds": report.seconds,
        "machine": asdict(report.card),
        "rows": [as_json(row) for comparison in report.comparisons for row in comparison.rows],
        "ratios": {c.model: dict(c.ratios) for c in report.comparisons if c.ratios},
    }


def _block(comparison: Comparison) -> list[list[str]]:
    """A model's lines in the terminal's table; a line of one cell spans it."""
    return [[comparison.model], *([f"  {cells[0]}", *cells[1:]] for cells in _cells(comparison))]


def _cells(comparison: Comparison) -> list[list[str]]:
    rows = [[row.label, *(column.cell(row) for column in COLUMNS)] for row in comparison.rows]
    if any(value is not None for value in comparison.ratios.values()):
        rows.append(["quantized/fp16", *(_ratio(comparison.ratios.get(c.name)) for c in COLUMNS)])
    return rows


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _legend(comparisons: Sequence[Comparison]) -> list[str]:
    """What the columns mean, and every row's own notes."""
    rows = [(c.model, row) for c in comparisons for row in c.rows]
    forecast = "forecast = file + KV cache + 300 MB; read bw = bytes read per token / decode time / measured bandwidth"
    lines = ["", forecast]
    if any(row.replica for _, row in rows):
        lines.append(
            "replica = made-up weights in the model's shapes and types: speed, memory and size are the model's"
        )
    for model, row in rows:
        reasons = [f"not measured: {row.skipped}"] if row.skipped else []
        lines += [f"{model} {row.label}: {note}" for note in (*reasons, *row.notes)]
    return lines


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) == 1:
        return cells[0]
    first, rest = cells[0].ljust(widths[0]), zip(cells[1:], widths[1:], strict=True)
    return "  ".join([first, *(cell.rjust(width) for cell, width in rest)]).rstrip()


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
