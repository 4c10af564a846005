"""The doctor: features against flags, and a run of the command."""

from __future__ import annotations

import json

from engine.doctor import compare_features
from tests.command import fourbit

BUILT = "CPU : AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | OPENMP = 1 |"
FLAGS = frozenset({"avx", "avx2", "f16c", "fma", "bmi2"})


def test_a_build_for_this_cpu_has_no_problem():
    assert compare_features(BUILT, FLAGS) == []


def test_unused_features_are_named_with_the_remedy():
    (finding,) = compare_features(BUILT, FLAGS | {"avx512f", "avx512_vnni"})
    assert "AVX512, AVX512_VNNI" in finding.text
    assert "make setup" in finding.remedy


def test_a_build_for_another_cpu_is_named():
    (finding,) = compare_features(BUILT, FLAGS - {"avx2"})
    assert "lacks: AVX2" in finding.text


def test_no_flags_known_nothing_to_say():
    assert compare_features(BUILT, frozenset()) == []


def test_the_command_agrees_with_its_exit_code(tmp_path):
    result = fourbit("doctor", "--json", home=tmp_path)
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == bool(report["n_problems"])
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"Python", "CPU", "llama.cpp", "memory", "disk", "model"} <= topics
    assert sum(finding["topic"] == "model" for finding in report["findings"]) == 3
