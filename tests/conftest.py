"""Converted files that many tests share: one small model per family, made once a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.quantize import quantize
from engine.errors import NotFound
from engine.home import find_model_file
from tests.checkpoints import make_checkpoint
from tests.shared import SHARED


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """converted(family, tokenizer="made", ftype="F16"): a GGUF file of a small checkpoint, through our converter."""
    folder = tmp_path_factory.mktemp("converted")

    @functools.cache
    def checkpoint(family: str, tokenizer: str) -> Path:
        return make_checkpoint(folder / f"{family}-{tokenizer}", family, tokenizer=tokenizer)

    @functools.cache
    def convert(family: str, tokenizer: str = "made", ftype: str = "F16") -> Path:
        if tokenizer == "genuine" and not (SHARED / "tokenizers").is_dir():
            pytest.skip("the genuine tokenizers (shared/ beside the project, or FOURBIT_SHARED) are absent")
        return quantize(checkpoint(family, tokenizer), folder / f"{family}-{tokenizer}-{ftype}.gguf", ftype).path

    return convert


@pytest.fixture
def fourbit_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder of the test's own."""
    monkeypatch.setenv("FOURBIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A small model with real weights, which comes as a Python package (make demo)."""
    try:
        return find_model_file("smollm2-135m")
    except NotFound as error:
        pytest.skip(str(error))
