"""tests/perf against its own past: keep the numbers of a run, and fail on a regression.

    python -m bench.gate save       run tests/perf, keep the numbers under .benchmarks/
    python -m bench.gate compare    run again, compare with the numbers kept last

Time is the median of each benchmark; memory is every `*_bytes` figure in its extra_info.
Source of the JSON layout: https://pytest-benchmark.readthedocs.io/en/stable/comparing.html
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import FourbitError, NotFound

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / ".benchmarks"
TIME_LIMIT = 0.20
MEMORY_LIMIT = 0.05
BYTES = "_bytes"


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and now, None on the side where it is missing; `limit` is the growth allowed."""

    benchmark: str
    figure: str
    before: float | None
    now: float | None
    limit: float

    @property
    def growth(self) -> float | None:
        if self.before is None or self.now is None:
            return None
        return self.now / self.before - 1 if self.before else float(self.now > 0)

    @property
    def fails(self) -> bool:
        """It grew beyond its limit, or is no longer measured; a new figure has nothing to regress from."""
        if self.growth is None:
            return self.now is None
        return self.growth > self.limit


def read_figures(path: Path) -> dict[tuple[str, str], float]:
    """(benchmark, figure) -> value of one pytest-benchmark JSON: median_s, and every *_bytes of extra_info."""
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        return {(b["fullname"], name): value for b in benchmarks for name, value in _figures(b).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise FourbitError(f"{path} is not a pytest-benchmark file ({error!r}): run `make bench-save` again") from error


def _figures(benchmark: Mapping[str, Any]) -> dict[str, float]:
    extra = benchmark["extra_info"].items()
    return {"median_s": benchmark["stats"]["median"]} | {name: value for name, value in extra if name.endswith(BYTES)}


def compare(before: Path, now: Path) -> list[Change]:
    """Every figure of two pytest-benchmark files, in the order of the newer one, vanished ones last."""
    old, new = read_figures(before), read_figures(now)
    return [Change(*key, old.get(key), new.get(key), _limit(key[1])) for key in {**new, **old}]


def _limit(figure: str) -> float:
    return MEMORY_LIMIT if figure.endswith(BYTES) else TIME_LIMIT


def table(changes: Sequence[Change]) -> str:
    """One line per figure, regressions marked."""
    rows: list[tuple[str, ...]] = [("benchmark", "figure", "before", "now", "change", "allowed", "")]
    rows += [_line(change) for change in changes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in aligned)


def _line(change: Change) -> tuple[str, ...]:
    before, now = ("-" if value is None else f"{value:.6g}" for value in (change.before, change.now))
    growth = "new" if change.before is None else "gone" if change.growth is None else f"{change.growth:+.1%}"
    verdict = "REGRESSION" if change.fails else ""
    return change.benchmark, change.figure, before, now, growth, f"{change.limit:+.0%}", verdict


def last_saved(store: Path) -> Path:
    """The newest file that `save` kept; NotFound says how to make one."""
    kept = sorted(store.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    if not kept:
        raise NotFound(f"no benchmark is kept under {store}: run `make bench-save` first, on the code to compare with")
    return kept[-1]


def run_perf(*options: str) -> None:
    """Run tests/perf with these pytest-benchmark options; SystemExit with pytest's code when it fails."""
    # pyproject.toml skips benchmarks in ordinary runs; both options at once are a usage error
    settings = ("-o", "addopts=--strict-markers", "--benchmark-only", f"--benchmark-storage=file://{STORE}")
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "perf"), *settings, *options]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def check() -> str:
    """Run tests/perf and compare with what was kept last: the table; SystemExit with it on a regression."""
    before = last_saved(STORE)
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "now.json"
        run_perf(f"--benchmark-json={now}")
        changes = compare(before, now)
    failed = sum(change.fails for change in changes)
    if failed:
        sys.exit(f"{table(changes)}\n{failed} of {len(changes)} figures regressed against {before}")
    return f"{table(changes)}\nno figure regressed against {before}"


def main(arguments: Sequence[str]) -> None:
    """`save` or `compare`; exit code 1 on a regression, 2 on a usage error."""
    if list(arguments) not in (["save"], ["compare"]):
        sys.stderr.write("usage: python -m bench.gate save|compare\n")
        sys.exit(2)
    try:
        if arguments[0] == "save":
            run_perf("--benchmark-save=fourbit")
        else:
            sys.stdout.write(check() + "\n")
    except FourbitError as error:
        sys.exit(f"bench.gate: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
