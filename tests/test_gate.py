"""The gate's verdicts on made-up pytest-benchmark files."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from bench import gate
from engine.errors import FourbitError, NotFound


def kept(path, **benchmarks):
    """A pytest-benchmark file of {name: (median_s, extra_info)}."""
    entries = [
        {"fullname": name, "stats": {"median": median_s}, "extra_info": extra}
        for name, (median_s, extra) in benchmarks.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmarks": entries}), encoding="utf-8")
    return path


def changes(tmp_path, before, now):
    found = gate.compare(kept(tmp_path / "before.json", **before), kept(tmp_path / "now.json", **now))
    return {(change.benchmark, change.figure): change for change in found}


@pytest.mark.parametrize(
    ("before", "now", "fails"),
    [
        pytest.param(1.0, 1.19, False, id="19 % slower passes"),
        pytest.param(1.0, 1.21, True, id="21 % slower fails"),
        pytest.param(1.0, 0.2, False, id="faster passes"),
    ],
)
def test_time_may_grow_by_a_fifth(tmp_path, before, now, fails):
    assert changes(tmp_path, {"load": (before, {})}, {"load": (now, {})})["load", "median_s"].fails is fails


@pytest.mark.parametrize(
    ("before", "now", "fails"),
    [
        pytest.param(1000, 1049, False, id="4.9 % more passes"),
        pytest.param(1000, 1051, True, id="5.1 % more fails"),
        pytest.param(1000, 10, False, id="less passes"),
        pytest.param(0, 1, True, id="from nothing fails"),
        pytest.param(0, 0, False, id="nothing stays nothing"),
    ],
)
def test_memory_may_grow_by_a_twentieth(tmp_path, before, now, fails):
    found = changes(
        tmp_path,
        {"load": (1.0, {"peak_private_bytes": before})},
        {"load": (1.0, {"peak_private_bytes": now})},
    )
    assert found["load", "peak_private_bytes"].fails is fails


def test_only_bytes_of_extra_info_are_compared(tmp_path):
    found = changes(
        tmp_path, {"load": (1.0, {"model": "a", "n_tokens": 1})}, {"load": (1.0, {"model": "b", "n_tokens": 9})}
    )
    assert list(found) == [("load", "median_s")]


def test_vanished_benchmark_fails_and_new_one_passes(tmp_path):
    found = changes(tmp_path, {"load": (1.0, {})}, {"decode": (1.0, {})})
    assert found["load", "median_s"].fails
    assert not found["decode", "median_s"].fails
    text = gate.table(list(found.values()))
    assert "gone" in text
    assert "new" in text


def test_table_marks_the_regression_and_only_it(tmp_path):
    found = changes(tmp_path, {"load": (1.0, {}), "decode": (1.0, {})}, {"load": (1.5, {}), "decode": (1.0, {})})
    lines = {line.split()[0]: line for line in gate.table(list(found.values())).splitlines()}
    assert lines["load"].endswith("REGRESSION")
    assert "+50.0%" in lines["load"]
    assert "REGRESSION" not in lines["decode"]


def test_newest_kept_file_is_the_one_compared_with(tmp_path):
    older, newer = (kept(tmp_path / "Linux-64bit" / f"000{i}_fourbit.json", load=(1.0, {})) for i in (2, 1))
    os.utime(older, (1, 1))
    assert gate.last_saved(tmp_path) == newer


def test_nothing_kept_says_what_to_run(tmp_path):
    with pytest.raises(NotFound, match="bench-save"):
        gate.last_saved(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": [{}]}'], ids=["empty", "list", "no stats"])
def test_damaged_file_is_an_error_of_ours(tmp_path, content):
    path = tmp_path / "0001_fourbit.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FourbitError, match=r"0001_fourbit\.json"):
        gate.read_figures(path)


def pytest_that_finds(monkeypatch, tmp_path, median_s):
    """Stands in for the run of tests/perf: writes the JSON that it was asked for."""

    def run(command, **_):
        option = next((word for word in command if word.startswith("--benchmark-json=")), None)
        if option:
            kept(tmp_path / "run" / option.rpartition("/")[2], load=(median_s, {}))
            os.replace(tmp_path / "run" / "now.json", option.partition("=")[2])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gate.subprocess, "run", run)
    monkeypatch.setattr(gate, "STORE", tmp_path / "store")
    kept(tmp_path / "store" / "machine" / "0001_fourbit.json", load=(1.0, {}))


def test_compare_exits_with_1_and_the_table_on_a_regression(tmp_path, monkeypatch, capsys):
    pytest_that_finds(monkeypatch, tmp_path, 1.5)
    with pytest.raises(SystemExit) as stopped:
        gate.main(["compare"])
    assert "REGRESSION" in str(stopped.value.code)  # a text as the code: printed to stderr, exit code 1


def test_compare_prints_the_table_when_all_is_well(tmp_path, monkeypatch, capsys):
    pytest_that_finds(monkeypatch, tmp_path, 1.1)
    gate.main(["compare"])
    assert "+10.0%" in capsys.readouterr().out


def test_failing_benchmarks_end_the_gate_with_their_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(gate.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 4))
    with pytest.raises(SystemExit) as stopped:
        gate.main(["save"])
    assert stopped.value.code == 4


def test_anything_else_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        gate.main(["erase"])
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
