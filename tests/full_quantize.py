"""Quantize a full-size made-up checkpoint and print what it cost: `python -m tests.full_quantize MODEL [--work DIR]`.

Writes a checkpoint of the model's exact shapes in the official layout (about 15 GB), runs the real
`fourbit quantize` on it, samples the memory of that process and the disk that its output folder
takes, prints one JSON object and deletes everything. With --ratios also times ggml_quantize_chunk
alone on the same tensors with as many threads (before and after, the mean counts), and the second
half of llama.cpp's own route, llama_model_quantize on an unquantized GGUF. Its first half, the
conversion to that GGUF, needs torch and transformers: where they are missing its time counts as 0,
so the ratio is an upper bound. With --stream the checkpoint is served by a hub on loopback.
Not a test: it needs 20 to 35 GB of disk and minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from bench.probe import Peak, memory_split
from convert.blocks import quantize_rows, row_bytes
from convert.mixture import FLOATS, MIXTURES
from convert.plan import plan_conversion
from convert.quantize import quantize as convert_checkpoint
from convert.slabs import spans
from engine.host import usable_cores
from engine.registry import model
from tests.full_checkpoint import write_full_checkpoint

PRIVATE_LIMIT_BYTES = 600 << 20
SAMPLE_S = 0.02
Figures = dict[str, object]


def folder_bytes(folder: Path) -> int:
    """Bytes of disk blocks that the files of a folder take now."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder) if entry.is_file())


def quantize(out: Path, *arguments: str, environment: dict[str, str] | None = None) -> Figures:
    """Run `fourbit quantize` and watch it from outside until it ends."""
    command = [sys.executable, "-m", "engine", "quantize", *arguments, "--out", str(out)]
    peak, disk_bytes, start = Peak(), 0, time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | (environment or {}))
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


def kernel_s(checkpoint: Path, qtype: str, n_threads: int) -> float:
    """Seconds that ggml_quantize_chunk takes on tensors of these shapes and types, and nothing else."""
    items = plan_conversion(checkpoint, qtype).items
    work = [(i.slot.qtype, s.n_rows + s.n_zero, i.slot.shape[0]) for i in items for s in spans(i)]
    waiting = iter([entry for entry in work if entry[0] not in FLOATS])
    lock = threading.Lock()

    def run() -> None:
        most = max(n_rows * n_columns for _, n_rows, n_columns in work)
        floats = np.random.default_rng(1).normal(0, 0.02, most).astype(np.float32)
        out = np.empty(4 * most, np.uint8)
        while True:
            with lock:
                entry = next(waiting, None)
            if entry is None:
                return
            kind, n_rows, n_columns = entry
            rows = floats[: n_rows * n_columns].reshape(n_rows, n_columns)
            quantize_rows(kind, rows, out[: n_rows * row_bytes(kind, n_columns)])

    threads = [threading.Thread(target=run) for _ in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def stock_s(checkpoint: Path, folder: Path, qtype: str) -> float:
    """Seconds of llama_model_quantize on an unquantized GGUF of the checkpoint, in a process of its own."""
    source = convert_checkpoint(checkpoint, folder / "source.gguf", "BF16", pad_ff=False).path
    code = "import sys; from pathlib import Path; from tests.stock import quantize_with_llama_cpp as q; q(*%r)"
    arguments = (str(source), str(folder / "stock.gguf"), MIXTURES[qtype].number)
    code = code.replace("q(*%r)", f"q(Path({arguments[0]!r}), Path({arguments[1]!r}), {arguments[2]})")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds = time.perf_counter() - start
    source.unlink()
    return seconds


def from_hub(key: str, checkpoint: Path, out: Path, qtype: str) -> Figures:
    """Quantize with --stream from a server in a process of its own."""
    code = f"from tests.full_hub import serve; serve({key!r}, {str(checkpoint)!r})"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    environment = json.loads(server.stdout.readline())
    home = out.parent.parent / "home"
    figures = quantize(out, key, "--stream", "--type", qtype, environment=environment | {"FOURBIT_HOME": str(home)})
    server.kill()
    fetched = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    return figures | {"fetched_to_disk_bytes": fetched}


def main() -> int:
    """Exit 1 when quantize failed or used more private memory than we promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--ratios", action="store_true")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    n_threads = usable_cores()
    with tempfile.TemporaryDirectory(prefix="fourbit-full-", dir=arguments.work) as work:
        checkpoint, out = Path(work, "checkpoint"), Path(work, "out", "model.gguf")
        out.parent.mkdir()
        write_full_checkpoint(model(arguments.model), checkpoint)
        source_bytes = folder_bytes(checkpoint)
        before_s = kernel_s(checkpoint, arguments.type, n_threads) if arguments.ratios else 0.0
        if arguments.stream:
            figures = from_hub(arguments.model, checkpoint, out, arguments.type)
        else:
            figures = quantize(out, "--checkpoint", str(checkpoint), "--type", arguments.type)
        if arguments.ratios:
            alone_s = (before_s + kernel_s(checkpoint, arguments.type, n_threads)) / 2
            stock = stock_s(checkpoint, Path(work), arguments.type)
            wall_s = float(str(figures["wall_s"]))
            figures |= {"kernel_alone_s": round(alone_s, 1), "ratio_to_kernel": round(wall_s / alone_s, 3)}
            figures |= {"stock_quantize_s": round(stock, 1), "ratio_to_stock_at_most": round(wall_s / stock, 3)}
    print(json.dumps({"model": arguments.model, "type": arguments.type, "source_bytes": source_bytes, **figures}))
    fits = figures["exit_code"] == 0 and float(str(figures["peak_private_mib"])) * 2**20 <= PRIVATE_LIMIT_BYTES
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
