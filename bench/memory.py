"""Predicted against measured memory: every model, context and KV type, each in a fresh process.

`python -m bench.memory [MODEL]...` writes a full-size replica a model, measures and deletes it, prints
a table and one JSON line. The prediction is engine/fit.py's, made before the file is opened.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import Case
from bench.worker import run_case
from convert.replica import write_replica
from engine import fit
from engine.errors import FourbitError
from engine.gguf_header import read_header
from engine.host import memory, usable_cores
from engine.registry import checkpoints, model
from engine.settings import KV_QTYPES, defaults

CONTEXTS = (512, 2048, 8192)
N_PROMPT, N_DECODE = 160, 4  # more than one batch


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: peak resident memory as predicted and as measured, bytes."""

    model: str
    n_ctx: int
    kv_qtype: str
    predicted_bytes: int
    measured_bytes: int
    private_bytes: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_bytes / self.measured_bytes - 1


def measure(path: Path, name: str, n_ctx: int, kv_qtype: str) -> Row:
    """One row; FourbitError when the process did not end well."""
    predicted = fit.fit(read_header(path), n_ctx, memory(), defaults().changed(kv_qtype=kv_qtype)).needed_bytes
    case = Case("memory", str(path), n_ctx, usable_cores(), N_PROMPT, N_DECODE, kv_qtype=kv_qtype)
    outcome = run_case(case)
    if outcome.error:
        raise FourbitError(f"{name} at {n_ctx} tokens, {kv_qtype}: {outcome.error}")
    return Row(name, n_ctx, kv_qtype, predicted, outcome.peak.rss_bytes, outcome.peak.private_bytes)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table as Markdown."""
    head = "| model | context | KV cache | predicted MiB | measured MiB | error |"
    return [head, "| --- | ---: | --- | ---: | ---: | ---: |"] + [
        f"| {row.model} | {row.n_ctx} | {row.kv_qtype} | {row.predicted_bytes / 2**20:.0f} | "
        f"{row.measured_bytes / 2**20:.0f} | {row.error:+.1%} |"
        for row in rows
    ]


def main(arguments: Sequence[str]) -> None:
    """Exit 1 with one line where something cannot be measured."""
    keys = list(arguments) or list(checkpoints())
    rows = []
    try:
        for key in keys:
            with tempfile.TemporaryDirectory(prefix="fourbit-memory-") as folder:
                path = write_replica(model(key), "Q4_K_M", Path(folder, "replica.gguf")).path
                for n_ctx in CONTEXTS:
                    rows += [measure(path, model(key).title, n_ctx, kv) for kv in KV_QTYPES]
                    print("\n".join(lines(rows)[-2:]), file=sys.stderr)
    except FourbitError as error:
        sys.exit(f"fourbit: {error}")
    print("\n".join(lines(rows)))
    worst = max(abs(row.error) for row in rows)
    print(json.dumps({"rows": [asdict(row) | {"error": row.error} for row in rows], "worst_error": worst}))


if __name__ == "__main__":
    main(sys.argv[1:])
