"""The report on made-up rows: alignment, ratios, labels, and the JSON that says it all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import report
from bench.machine import Card
from bench.row import Comparison, Row, ratios

CARD = Card(
    date="2026-11-24T03:00:00+00:00",
    cpu="A Processor 3000",
    n_threads=2,
    n_physical_cores=4,
    memory_total_bytes=16_000_000_000,
    memory_available_bytes=12_000_000_000,
    memory_limit_bytes=None,
    read_bytes_per_s=40e9,
    llama_cpp_python="0.3.36",
    llama_flags="AVX2 = 1",
    omp_wait_policy="passive",
    python="3.11.2",
    fourbit="0.1.0",
)
QUANTIZED = Row(
    "DeepSeek-LLM-7B-Chat",
    "deepseek-llm-7b-chat",
    "Q4_K_M",
    replica=True,
    file_bytes=4_219_000_000,
    load_cold_s=13.9,
    load_warm_s=0.26,
    n_prompt=128,
    ttft_ms=10_200.0,
    prefill_tokens_per_s=12.6,
    n_decode=32,
    decode_median_ms=200.0,
    decode_p95_ms=215.0,
    peak_rss_bytes=4606 << 20,
    peak_private_bytes=500 << 20,
    peak_file_bytes=4106 << 20,
    predicted_peak_bytes=4700 << 20,
    bandwidth_share=0.5,
)
FP16 = replace(
    QUANTIZED,
    qtype="F16",
    file_bytes=13_820_000_000,
    decode_median_ms=430.0,
    load_cold_s=None,
    peak_rss_bytes=13_700 << 20,
)
SKIPPED = Row("Qwen-7B-Chat", "qwen-7b-chat", "F16", replica=True, skipped="needs 16.0 GB, 12.0 GB are available")
COMPARISONS = (
    Comparison("DeepSeek-LLM-7B-Chat", QUANTIZED, FP16),
    Comparison("Qwen-7B-Chat", replace(QUANTIZED, model="Qwen-7B-Chat", notes=("40 % was cached",)), SKIPPED),
)
REPORT = report.Report("fourbit bench", CARD, COMPARISONS, 754.0)


def columns_of(line: str) -> list[str]:
    return [word.strip() for word in line.split("|")[1:-1]]


def test_ratios_are_quantized_over_fp16_of_what_both_have():
    found = ratios(QUANTIZED, FP16)
    assert found["file_bytes"] == pytest.approx(4.219 / 13.82)
    assert found["decode_median_ms"] == pytest.approx(200 / 430)
    assert found["decode_speedup"] == pytest.approx(2.15)
    assert found["load_cold_s"] is None


def test_table_fits_a_terminal_and_lines_up():
    lines = report.table_lines(COMPARISONS)
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 130
    heads, row = table[1], next(line for line in table if line.startswith("  Q4_K_M"))
    for end in (heads.index("GB") + 2, heads.index("p95 ms") + 6):
        assert row[end - 1] != " "  # right-aligned numbers end where their head ends
        assert row[end] == " "


def test_every_replica_row_says_so():
    for row in (QUANTIZED, SKIPPED, replace(QUANTIZED, n_layer=2)):
        lines = report.table_lines([Comparison("m", row, None)])
        assert any(row.label in line and "replica" in line for line in lines)
    assert replace(QUANTIZED, n_layer=2).label == "Q4_K_M replica, 2 layers"
    assert replace(QUANTIZED, replica=False).label == "Q4_K_M"


def test_row_that_was_not_measured_shows_dashes_and_the_reason():
    lines = report.table_lines([Comparison("Qwen-7B-Chat", None, SKIPPED)])
    row = next(line for line in lines if line.startswith("  F16"))
    assert set(row.split()[2:]) == {report.ABSENT}
    assert any("needs 16.0 GB, 12.0 GB are available" in line for line in lines)


def test_ratio_row_only_where_there_are_two_sides():
    both, one = (report.table_lines([comparison]) for comparison in COMPARISONS)
    assert any(line.startswith("  quantized/fp16") for line in both)
    assert not any(line.startswith("  quantized/fp16") for line in one)


def test_markdown_table_has_as_many_cells_in_every_line():
    text = report.markdown(REPORT)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(columns_of(line)) for line in table} == {2 + len(report.COLUMNS)}
    assert "40 % was cached" in text
    assert CARD.cpu in text
    assert "`fourbit bench`" in text


def test_json_round_trips_with_every_row_and_its_replica_flag():
    found = json.loads(json.dumps(report.json_object(REPORT)))
    assert [row["replica"] for row in found["rows"]] == [True] * 4
    assert found["rows"][0]["decode_median_ms"] == 200.0
    assert found["rows"][3]["skipped"] == SKIPPED.skipped
    assert found["machine"]["read_bytes_per_s"] == 40e9
    assert found["ratios"]["DeepSeek-LLM-7B-Chat"]["decode_speedup"] == pytest.approx(2.15)


@pytest.mark.parametrize(("limit", "expected"), [(None, False), (8_000_000_000, True)], ids=["no limit", "cgroup"])
def test_card_names_the_memory_limit_where_there_is_one(limit, expected):
    text = "\n".join(report.card_lines(replace(CARD, memory_limit_bytes=limit)))
    assert ("limited to 8.0 GB" in text) is expected
    assert "2 of 4 physical cores" in text
    assert "40.0 GB/s" in text
