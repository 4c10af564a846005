"""One case in a fresh process: the parent's side (start, watch, collect) and the child's (run, one JSON line).

    parent  python -m bench.worker '{"name": "decode", "path": …}'
    child   {"figures": {…}}  or  {"error": "…"}    as the last line of stdout

A child that crashes, is killed or hangs is an Outcome with the reason, never an exception here.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from bench.cases import Case, measure
from bench.probe import MemorySplit, Peak, memory_split
from engine.errors import FourbitError

COMMAND = (sys.executable, "-m", "bench.worker")
SAMPLE_EVERY_S = 0.02
TIME_LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one process measured, or why it did not; its memory's peak either way."""

    figures: Mapping[str, Any] | None
    error: str | None
    peak: Peak


def run_case(case: Case, time_limit_s: float = TIME_LIMIT_S) -> Outcome:
    """Measure a case in a process of its own, its memory sampled from here so as not to disturb it."""
    command = [*COMMAND, json.dumps(asdict(case))]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err) as child:
            try:
                peak, late = _watch(child, time.monotonic() + time_limit_s)
            finally:
                child.kill()
        return _outcome(child.returncode, _text(out), _text(err), peak, time_limit_s if late else None)


def _watch(child: subprocess.Popen[bytes], deadline: float) -> tuple[Peak, bool]:
    """Sample the child's memory until it ends; True when it had to be stopped."""
    peak = Peak()
    while child.poll() is None:
        if time.monotonic() > deadline:
            return peak, True
        peak.add(memory_split(child.pid))
        time.sleep(SAMPLE_EVERY_S)
    return peak, False


def _outcome(code: int, out: str, err: str, peak: Peak, limit_s: float | None) -> Outcome:
    if limit_s is not None:
        return Outcome(None, f"stopped after {limit_s:.0f} s", peak)
    with contextlib.suppress(ValueError, IndexError, AttributeError):
        answer = json.loads(out.splitlines()[-1])
        if code == 0 and (answer.get("figures") or answer.get("error")):
            return _answered(answer, peak)
    return Outcome(None, _ending(code, err), peak)


def _answered(answer: dict[str, Any], peak: Peak) -> Outcome:
    figures = answer.get("figures")
    if figures and figures["memory"]:
        peak.add(MemorySplit(**figures["memory"]))  # the last word: between two samples it may have grown
    return Outcome(figures, answer.get("error"), peak)


def _ending(code: int, err: str) -> str:
    """Why a process without an answer ended: its signal, or its last words."""
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), as the kernel does when memory runs out"
    said = (err.strip().splitlines() or ["it said nothing"])[-1]
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process died of {signal.Signals(-code).name}: {said}"
    return f"its process ended with exit code {code}: {said}"


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def main() -> None:
    """The child's side: measure the case in argv[1] and write one JSON line."""
    case = Case(**json.loads(sys.argv[1]))
    try:
        answer: dict[str, Any] = {"figures": measure(case)}
    except FourbitError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
