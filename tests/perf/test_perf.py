"""Benchmarks on small replicas: run by `make bench-save` and `make bench-compare`, skipped by `make test`.

extra_info carries sizes, and memory under names that end in _bytes: those are compared, too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from bench import overhead
from bench.plan import Plan
from bench.worker import run_case
from convert.quantize import quantize
from convert.replica import write_replica
from engine import native
from engine.engine import Engine
from engine.gguf_header import read_header
from engine.host import usable_cores
from engine.registry import model
from engine.vocab import open_vocabulary
from tests.checkpoints import make_checkpoint, shape_of

REPLICA, N_LAYER = "chatglm3-6b", 2
PROMPT = list(range(300, 428))
TEXT = "“与此同时，AI大模型、Transformer架构和GPU算力等话题也成为焦点。” The quick brown fox. " * 50


@pytest.fixture(scope="module")
def replica(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("perf") / "replica.gguf"
    return write_replica(model(REPLICA), "Q4_K_M", path, n_layer=N_LAYER).path


@pytest.fixture(scope="module")
def context(replica):
    with native.Model(replica) as opened:
        context = native.Context(opened, 512, n_threads=usable_cores())
        yield context
        context.close()


def note_sizes(benchmark, path: Path, case: str) -> None:
    """File size, and the memory of a fresh process that does the same."""
    peak = run_case(Plan(n_decode=8, rounds=1).case(case, path, "Q4_K_M")).peak
    benchmark.extra_info["file_bytes"] = read_header(path).file_bytes
    benchmark.extra_info["peak_rss_bytes"] = peak.rss_bytes
    benchmark.extra_info["peak_private_bytes"] = peak.private_bytes


def test_load(benchmark, replica):
    def load():
        with Engine.open(replica, n_ctx=512):
            pass

    benchmark.pedantic(load, rounds=5, warmup_rounds=1)
    note_sizes(benchmark, replica, "load")


def test_prefill(benchmark, replica, context):
    def prefill():
        context.truncate(0)
        context.decode(PROMPT, 0)

    benchmark.pedantic(prefill, rounds=10, warmup_rounds=2)
    benchmark.extra_info["n_prompt"] = len(PROMPT)
    note_sizes(benchmark, replica, "prefill")


def test_decode(benchmark, replica, context):
    context.truncate(0)
    context.decode(PROMPT, 0)
    position = itertools.count(len(PROMPT))
    benchmark.pedantic(lambda: context.decode([300], next(position)), rounds=64, warmup_rounds=4)
    note_sizes(benchmark, replica, "decode")


def test_tokenization(benchmark, replica):
    _, vocabulary = open_vocabulary(replica)
    ids = benchmark(vocabulary.encode, TEXT)
    benchmark.extra_info["n_ids"] = len(ids)
    benchmark.extra_info["n_characters"] = len(TEXT)


def test_quantize(benchmark, tmp_path):
    shape = replace(shape_of("deepseek-llm"), n_embd=1024, n_head=8, n_head_kv=8, n_ff=2816)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek-llm", shape=shape)
    out = tmp_path / "out.gguf"
    written = benchmark.pedantic(quantize, args=(checkpoint, out, "Q4_K_M"), kwargs={"overwrite": True}, rounds=5)
    benchmark.extra_info["source_file_bytes"] = sum(path.stat().st_size for path in checkpoint.glob("*.bin"))
    benchmark.extra_info["file_bytes"] = written.n_bytes


def test_decode_loop_overhead(benchmark, replica):
    figures = benchmark.pedantic(overhead.measure, args=(replica,), kwargs={"n_tokens": 100}, rounds=1)
    benchmark.extra_info.update(figures)
    assert figures["bare_ms"] >= overhead.SHORTEST_TOKEN_MS
    assert figures["ratio"] <= 1.01
