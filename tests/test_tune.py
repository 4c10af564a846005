"""Settings: measured, kept, used, and dropped when machine, model or llama.cpp change."""

from __future__ import annotations

import json

import pytest

from bench import tune as tuning
from engine import Engine, pages, settings
from engine.gguf_header import read_header
from engine.home import home
from engine.settings import Settings, defaults, is_tuned, keep, settings_for
from tests.command import fourbit


@pytest.fixture
def path(converted, fourbit_home):
    return converted("deepseek-llm", "made", "Q4_K_M")


def test_tune_measures_keeps_and_the_engine_uses(path, capsys):
    outcome = tuning.tune(path, budget_s=4)
    assert outcome.seconds_s < 30
    assert set(outcome.tables) >= {"threads for decode", "threads for prefill"}
    assert outcome.tuned.decode_ms > 0
    assert outcome.stock is None or outcome.stock.decode_ms > 0
    odd = outcome.settings.changed(n_batch=64, n_threads=1)
    keep(read_header(path), odd)
    with Engine.open(path, n_ctx=128) as engine:
        assert engine.settings == odd
        assert engine._context.n_batch == 64


def test_the_command_prints_and_keeps(path):
    result = fourbit("tune", path, "--budget", "3", home=home())
    assert result.returncode == 0, result.stderr
    assert "used by default from now on" in result.stdout
    assert is_tuned(read_header(path))


def test_another_machine_model_or_build_is_not_tuned(path, monkeypatch):
    header = read_header(path)
    keep(header, Settings(1, 1, 32))
    assert settings_for(header).n_batch == 32
    monkeypatch.setattr(settings, "usable_cores", lambda: 77)
    assert settings_for(header).n_batch != 32
    monkeypatch.undo()
    monkeypatch.setattr(settings.importlib.metadata, "version", lambda name: "0")
    assert not is_tuned(header)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_spoiled_file_means_defaults(path, content):
    header = read_header(path)
    kept = keep(header, Settings(1, 1, 32))
    kept.write_text(content)
    assert settings_for(header) == defaults()


@pytest.mark.parametrize(
    "values", [{"n_threads": 0}, {"n_batch": -1}, {"repack": 1}, {"flash_attention": "x"}, {"more": 1}]
)
def test_settings_that_make_no_sense_mean_defaults(path, values):
    header = read_header(path)
    kept = keep(header, Settings(1, 1, 32))
    data = json.loads(kept.read_text())
    for entry in data.values():
        entry |= values
    kept.write_text(json.dumps(data))
    assert settings_for(header) == defaults()


def test_what_is_asked_for_wins(path):
    keep(read_header(path), Settings(1, 1, 32))
    with Engine.open(path, n_ctx=128, n_batch=16) as engine:
        assert engine.settings.n_batch == 16
        assert engine.settings.n_threads == 1


def test_repacked_pages_go_back_and_the_reply_is_the_same(path):
    """The file's own pages are dropped, not the copies: what is computed afterwards does not change."""
    from engine import native

    header = read_header(path)
    assert any(pages.is_repacked(tensor) for tensor in header.tensors)
    with native.Model(path, repack=True) as model:
        context = native.Context(model, 64, n_threads=1)
        context.decode(list(range(300, 340)), 0)
        before = context.logits().copy()
        released = pages.release_repacked(header)
        context.truncate(0)
        context.decode(list(range(300, 340)), 0)
        assert (context.logits() == before).all()
        context.close()
    assert released > 0
    with Engine.open(path, n_ctx=64, repack=True) as engine:
        assert engine.settings.repack
        engine.ask("hello", max_tokens=2)


def test_candidates_respect_affinity(monkeypatch):
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 1)
    assert tuning.thread_counts() == [1]
