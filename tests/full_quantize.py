"""Quantize a full-size made-up checkpoint and print what it cost: `python -m tests.full_quantize MODEL [--work DIR]`.

Writes a checkpoint of the model's exact shapes in the official layout (about 15 GB), runs the real
`fourbit quantize` on it, samples the memory of that process and the disk that its output folder
takes, prints one JSON object and deletes everything. Not a test: it needs 20 GB of disk and minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.probe import Peak, memory_split
from engine.registry import model
from tests.full_checkpoint import write_full_checkpoint

PRIVATE_LIMIT_BYTES = 600 << 20
SAMPLE_S = 0.02


def folder_bytes(folder: Path) -> int:
    """Bytes of disk blocks that the files of a folder take now."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder) if entry.is_file())


def quantize(checkpoint: Path, out: Path, qtype: str) -> dict[str, object]:
    """Run `fourbit quantize` and watch it from outside until it ends."""
    command = [sys.executable, "-m", "engine", "quantize", "--checkpoint", str(checkpoint), "--out", str(out)]
    peak, disk_bytes, start = Peak(), 0, time.perf_counter()
    process = subprocess.Popen([*command, "--type", qtype])
    while process.poll() is None:
        peak.add(memory_split(process.pid))
        disk_bytes = max(disk_bytes, folder_bytes(out.parent))
        time.sleep(SAMPLE_S)
    return {
        "exit_code": process.returncode,
        "wall_s": round(time.perf_counter() - start, 1),
        "peak_private_mib": round(peak.private_bytes / 2**20, 1),
        "peak_rss_mib": round(peak.rss_bytes / 2**20, 1),
        "peak_disk_bytes": disk_bytes,
        "output_bytes": out.stat().st_size if out.exists() else None,
    }


def main() -> int:
    """Exit 1 when quantize failed or used more private memory than we promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fourbit-full-", dir=arguments.work) as work:
        checkpoint, out = Path(work, "checkpoint"), Path(work, "out", "model.gguf")
        out.parent.mkdir()
        write_full_checkpoint(model(arguments.model), checkpoint)
        source_bytes = folder_bytes(checkpoint)
        figures = quantize(checkpoint, out, arguments.type)
    print(json.dumps({"model": arguments.model, "type": arguments.type, "source_bytes": source_bytes, **figures}))
    fits = figures["exit_code"] == 0 and float(str(figures["peak_private_mib"])) * 2**20 <= PRIVATE_LIMIT_BYTES
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
