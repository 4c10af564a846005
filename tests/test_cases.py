"""Cases, workers and plans on a replica small enough for a test; structure and invariants, never timings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import plan as plans
from bench import subject as subjects
from bench import worker
from bench.cases import Case, prompt_ids
from bench.probe import Peak
from bench.row import read_bytes_per_token
from bench.subject import Subject, pair_of_model, pairs_of_files
from convert.replica import write_replica
from engine.gguf_header import read_header
from engine.host import Memory
from engine.registry import models

SPEC = models()["chatglm3-6b"]
TINY = replace(SPEC, shape=replace(SPEC.shape, n_layer=2, n_embd=256, n_head=4, n_head_kv=2, n_ff=512))
PLAN = plans.Plan(n_ctx=64, n_prompt=24, rounds=2, n_past=4, n_warmup=1, n_decode=5, n_decode_fp16=3, n_threads=1)


def silent(text: str) -> None:
    assert text


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("replica") / "tiny.gguf"
    write_replica(TINY, "Q4_K_M", path)
    return path


def case(name: str, path: Path) -> Case:
    return PLAN.case(name, path, "Q4_K_M")


def test_load_case_reports_every_round_and_its_memory(tiny_file):
    outcome = worker.run_case(case("load", tiny_file))
    assert outcome.error is None
    assert len(outcome.figures["rounds_s"]) == PLAN.rounds
    assert outcome.figures["load_s"] > 0
    assert outcome.figures["import_s"] > 0
    assert outcome.peak.rss_bytes >= outcome.peak.private_bytes > 0
    assert outcome.peak.file_bytes >= tiny_file.stat().st_size / 2  # the weights are mapped, not copied


def test_prefill_case_counts_its_prompt(tiny_file):
    figures = worker.run_case(case("prefill", tiny_file)).figures
    assert figures["n_prompt"] == PLAN.n_prompt
    assert len(figures["rounds_s"]) == PLAN.rounds
    prefill_ms = PLAN.n_prompt / figures["prefill_tokens_per_s"] * 1e3
    assert figures["ttft_ms"] > prefill_ms * 0.5


def test_decode_case_leaves_out_the_warm_up(tiny_file):
    figures = worker.run_case(case("decode", tiny_file)).figures
    assert figures["n_decode"] == len(figures["tokens_s"]) == PLAN.n_decode
    assert 0 < figures["decode_median_ms"] <= figures["decode_p95_ms"]
    assert PLAN.n_past < figures["n_past"] <= PLAN.n_ctx


def test_prompt_is_the_same_in_every_run_and_inside_the_vocabulary():
    ids = prompt_ids(128, 1000)
    assert ids == prompt_ids(128, 1000)
    assert len(ids) == 128
    assert all(0 <= id < 1000 for id in ids)


def test_error_of_ours_in_the_child_is_the_reason(tmp_path):
    path = tmp_path / "not.gguf"
    path.write_bytes(b"not a model" * 10)
    outcome = worker.run_case(case("load", path))
    assert outcome.figures is None
    assert "not a GGUF file" in outcome.error


KILL = "import os, signal; os.kill(os.getpid(), signal.%s)"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(KILL % "SIGKILL", "memory runs out", id="killed"),
        pytest.param(KILL % "SIGSEGV", "SIGSEGV", id="crashed"),
        pytest.param("import sys; sys.exit('no such thing')", "exit code 1: no such thing", id="failed"),
        pytest.param("print('{}')", "exit code 0", id="silent"),
        pytest.param("import time; time.sleep(60)", "stopped after", id="hung"),
    ],
)
def test_child_that_ends_badly_is_a_reason_not_an_exception(monkeypatch, tmp_path, code, reason):
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", code))
    limit_s = 1.0 if reason == "stopped after" else 30.0
    outcome = worker.run_case(case("load", tmp_path / "any"), time_limit_s=limit_s)
    assert outcome.figures is None
    assert reason in outcome.error


def test_memory_that_only_the_child_saw_counts():
    split = {"rss_bytes": 5, "private_bytes": 4, "file_bytes": 1, "peak_rss_bytes": 9, "source": "/proc"}
    outcome = worker._outcome(
        0, "\n" + json.dumps({"figures": {"load_s": 1.0, "memory": split}}) + "\n", "", Peak(), None
    )
    assert (outcome.peak.rss_bytes, outcome.peak.private_bytes) == (9, 4)


def measured(subject, **changes):
    return plans.measure(subject, replace(PLAN, **changes), silent)


def test_file_at_hand_yields_a_whole_row_and_stays(tiny_file):
    row = measured(pairs_of_files([tiny_file])[0].quantized, read_bytes_per_s=1e12)
    assert row.skipped is None
    assert row.replica  # the file says so itself
    assert row.qtype == "Q4_K_M"
    assert row.file_bytes == tiny_file.stat().st_size
    assert row.n_decode == PLAN.n_decode
    assert row.peak_rss_bytes >= max(row.peak_private_bytes, row.peak_file_bytes)
    expected = row.read_bytes_per_token / (row.decode_median_ms / 1e3) / 1e12
    assert row.bandwidth_share == pytest.approx(expected)
    assert (row.load_cold_s is not None) or any("cold" in note for note in row.notes)


def test_replica_is_measured_labelled_and_gone(tmp_path):
    row = measured(Subject(TINY.title, "F16", spec=TINY, n_layer=1), work=tmp_path)
    assert row.skipped is None
    assert row.label == "F16 replica, 1 layers"
    assert row.n_decode == PLAN.n_decode_fp16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_replica_is_gone_whatever_ends_the_run(tmp_path, monkeypatch, error):
    def interrupted(case):
        assert Path(case.path).is_file()
        raise error

    monkeypatch.setattr(plans, "run_case", interrupted)
    with pytest.raises(error):
        measured(Subject(TINY.title, "Q4_K_M", spec=TINY, n_layer=1), work=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed_and_those_of_a_live_one_kept(tmp_path):
    dead, alive, strange = (tmp_path / f"{subjects.FOLDER}{name}" for name in ("999999999", "1", "notes"))
    for folder in (dead, alive, strange):
        folder.mkdir()
        (folder / "x.gguf").touch()
    subjects.replica_folder(tmp_path)
    assert not dead.exists()
    assert alive.exists()
    assert strange.exists()


def test_model_that_does_not_fit_in_memory_is_a_row_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "memory", lambda: Memory(8_000_000_000, 5_000_000_000, None))
    row = measured(Subject(SPEC.title, "F16", spec=SPEC), work=tmp_path)
    assert "5.0 GB" in row.skipped
    assert "12.7 GB" in row.skipped  # 12.49 of weights, KV cache and allowance
    assert row.replica
    assert row.load_warm_s is None
    assert list(tmp_path.iterdir()) == []


def test_replica_that_does_not_fit_on_disk_is_a_row_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "memory", lambda: Memory(64 << 30, 64 << 30, None))
    monkeypatch.setattr(subjects, "disk_free_bytes", lambda path: 3_000_000_000)
    row = measured(Subject(SPEC.title, "F16", spec=SPEC), work=tmp_path)
    assert "12.5 GB" in row.skipped
    assert "3.0 GB" in row.skipped
    assert "--work" in row.skipped


def test_failed_case_is_a_note_and_the_others_still_count(tiny_file, monkeypatch):
    def half(case):
        if case.name == "decode":
            return worker.Outcome(None, "its process was killed", Peak())
        return worker.run_case(case)

    monkeypatch.setattr(plans, "run_case", half)
    row = measured(pairs_of_files([tiny_file])[0].quantized)
    assert row.decode_median_ms is None
    assert row.load_warm_s > 0
    assert "decode: its process was killed" in row.notes


def test_load_is_not_called_cold_while_the_file_is_cached(tiny_file, monkeypatch):
    monkeypatch.setattr(plans, "evict", lambda path: 0.37)
    row = measured(pairs_of_files([tiny_file])[0].quantized)
    assert row.load_cold_s is None
    assert any("37%" in note for note in row.notes)


def test_token_reads_all_weights_but_the_looked_up_embedding(tiny_file):
    header = read_header(tiny_file)
    sizes = {tensor.name: tensor.n_bytes for tensor in header.tensors}
    assert read_bytes_per_token(header) == sum(sizes.values()) - sizes["token_embd.weight"]
    tied = replace(header, tensors=tuple(t for t in header.tensors if t.name != "output.weight"))
    assert read_bytes_per_token(tied) == sum(sizes.values()) - sizes["output.weight"]


def test_models_folder_is_preferred_to_a_replica_except_for_small_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURBIT_HOME", str(tmp_path))
    path = tmp_path / "models" / f"{SPEC.key}-Q4_K_M.gguf"
    path.parent.mkdir()
    path.touch()
    pair = pair_of_model(SPEC, "Q4_K_M", None)
    assert (pair.quantized.path, pair.fp16.path) == (path, None)
    assert pair_of_model(SPEC, "Q4_K_M", 2).quantized.path is None


def test_files_of_one_name_stand_side_by_side(tiny_file, tmp_path):
    fp16 = tmp_path / "fp16.gguf"
    write_replica(TINY, "F16", fp16)
    (pair,) = pairs_of_files([fp16, tiny_file])
    assert (pair.quantized.path, pair.fp16.path) == (tiny_file, fp16)


def test_share_follows_the_best_bandwidth_seen(tiny_file):
    (pair,) = pairs_of_files([tiny_file])
    (found,) = plans.compare([pair], replace(PLAN, read_bytes_per_s=1e9), silent)
    doubled = plans.with_bandwidth(found, 2e9)
    assert doubled.quantized.bandwidth_share == pytest.approx(found.quantized.bandwidth_share / 2)
    assert doubled.fp16 is None
