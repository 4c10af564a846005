"""Memory promised before it is taken."""

from __future__ import annotations

import json

import pytest

from engine import Engine, engine, fit
from engine.errors import DoesNotFit
from engine.gguf_header import read_header
from engine.host import Memory
from engine.registry import checkpoints
from engine.settings import defaults
from tests.command import fourbit

GB = 1_000_000_000
WEIGHTS = {"qwen-7b-chat": 4_900_000_000, "chatglm3-6b": 3_881_000_000, "deepseek-llm-7b-chat": 4_222_000_000}


def estimate(key, gb, n_ctx, kv_qtype="F16"):
    there = Memory(gb * GB, gb * GB, gb * GB)
    return fit.estimate(checkpoints()[key].shape, WEIGHTS[key], n_ctx, there, kv_qtype=kv_qtype)


@pytest.mark.parametrize("key", checkpoints())
@pytest.mark.parametrize("gb", range(1, 9))
@pytest.mark.parametrize("kv_qtype", ["F16", "Q8_0"])
def test_the_largest_context_fits_and_the_next_does_not(key, gb, kv_qtype):
    largest = estimate(key, gb, 1, kv_qtype).largest_n_ctx
    if gb < WEIGHTS[key] / GB:
        assert largest == 0
    if largest:
        assert estimate(key, gb, largest, kv_qtype).fits
    if largest < checkpoints()[key].shape.n_ctx_train:
        assert not estimate(key, gb, largest + 2 * fit.KV_PADDING, kv_qtype).fits


def test_known_sizes_of_the_kv_cache():
    shapes = {key: spec.shape for key, spec in checkpoints().items()}
    assert fit.kv_bytes(shapes["qwen-7b-chat"], 2048, "F16") == 2048 * 512 << 10
    assert fit.kv_bytes(shapes["deepseek-llm-7b-chat"], 2048, "F16") == 2048 * 480 << 10
    assert fit.kv_bytes(shapes["chatglm3-6b"], 2048, "F16") == 2048 * 28 << 10
    assert fit.kv_bytes(shapes["qwen-7b-chat"], 2048, "Q8_0") == 2048 * 272 << 10


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_load_that_cannot_fit_is_refused_before_it_starts(converted, monkeypatch, share):
    path = converted("qwen")
    free = int(share * fit.fit(read_header(path), 64, Memory(GB, GB, None), defaults()).needed_bytes)
    monkeypatch.setattr(engine, "memory", lambda: Memory(free, free, free))
    monkeypatch.setattr(engine.native, "Model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(DoesNotFit, match="GB are free"):
        Engine.open(path, n_ctx=64)


def test_the_refusal_names_the_setting_that_would_fit():
    header_free = estimate("qwen-7b-chat", 6, 8192)
    assert not header_free.fits
    assert f"--ctx {header_free.largest_n_ctx}" in header_free.remedy()


def test_the_command_knows_a_model_that_is_not_here(tmp_path):
    result = fourbit("fit", "deepseek-llm-7b-chat", "--ctx", 4096, "--json", home=tmp_path)
    found = json.loads(result.stdout)
    assert found["weight_bytes"] == pytest.approx(WEIGHTS["deepseek-llm-7b-chat"], rel=0.001)
    assert found["kv_bytes"] == 4096 * 480 << 10
    profiles = {(p["machine_gb"], p["kv_qtype"]) for p in found["profiles"]}
    assert profiles == {(8, "F16"), (8, "Q8_0"), (16, "F16"), (16, "Q8_0")}


def test_the_command_in_words(tmp_path):
    result = fourbit("fit", "qwen-7b-chat", home=tmp_path)
    assert "not here yet" in result.stdout
    assert "a machine of  8 GB" in result.stdout
