"""Imports point one way, and only the modules named for it touch the libraries or print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for package in ("engine", "convert", "bench") for path in (ROOT / package).rglob("*.py"))
CONVERT_MAY_IMPORT = {"errors", "registry", "host", "home", "gguf_header", "fit", "settings"}
# what `fourbit` and `python -m` run
COMMANDS = {
    "cli",
    "doctor_cli",
    "fit_cli",
    "tune_cli",
    "gate",
    "overhead",
    "busy",
    "lookup",
    "memory",
    "turns",
    "worker",
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package, names = path.relative_to(ROOT).parts[0], imported(path)
    packages = {name.split(".")[0] for name in names}
    if package == "engine":
        assert not packages & {"convert", "bench"}
    if package == "convert":
        assert "bench" not in packages
        assert {name.split(".")[1] for name in names if name.startswith("engine.")} <= CONVERT_MAY_IMPORT
    assert ("llama_cpp" in packages) == (path == ROOT / "engine" / "native.py")
    assert ("libggml" in path.read_text(encoding="utf-8")) == (path == ROOT / "convert" / "blocks.py")
    assert not packages & {"torch", "transformers", "pickle"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_print(path):
    if path.stem in COMMANDS:
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert "click" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("module", ["engine", "engine.cli", "engine.gguf_header", "convert.quantize", "convert.cli"])
def test_importing_does_not_load_llama_cpp(module):
    code = f"import {module}, sys; print(sorted({{'llama_cpp', 'torch', 'transformers'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
