"""The reference data that tests may use: ../shared beside the project, absent for most users."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("FOURBIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))

needs_shared = pytest.mark.skipif(
    not (SHARED / "goldens").is_dir(),
    reason="the genuine tokenizers and golden ids (shared/ beside the project, or FOURBIT_SHARED) are absent",
)
