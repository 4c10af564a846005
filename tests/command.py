"""The real command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def fourbit(*arguments: object, home: Path | None = None, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `fourbit` with these arguments and this FOURBIT_HOME; text in, text out."""
    environment = os.environ | ({"FOURBIT_HOME": str(home)} if home else {})
    command = [sys.executable, "-m", "engine", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, input=stdin, timeout=120, check=False
    )
