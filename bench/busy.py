"""Decode while something else wants the cores: waiting threads that sleep against threads that spin.

`python -m bench.busy [FILE]` prints one JSON line. Each round runs the same reply in a fresh process
with OMP_WAIT_POLICY=passive (our default) and active, in turns, beside one busy loop a core, and once
without them. Without a file, on a replica of four layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from convert.replica import write_replica
from engine.errors import FourbitError
from engine.host import usable_cores
from engine.registry import model

REPLICA, N_LAYER = "deepseek-llm-7b-chat", 4
ROUNDS, N_TOKENS = 3, 24
POLICIES = ("passive", "active")


def decode_ms(path: Path, policy: str) -> float:
    """Median ms of an id in a process of its own under this policy."""
    command = [sys.executable, "-m", "bench.busy", "--measure", str(path)]
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout)


def measure_here(path: Path) -> float:
    """The same in this process."""
    from bench.cases import prompt_ids
    from engine import native

    with native.Model(path) as opened:
        context = native.Context(opened, 256, n_threads=usable_cores())
        context.decode(prompt_ids(16, opened.n_vocab), 0)
        times_s = []
        for position in range(16, 16 + N_TOKENS):
            start = time.perf_counter()
            context.decode([7], position)
            times_s.append(time.perf_counter() - start)
        context.close()
    return statistics.median(times_s[4:]) * 1e3


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(path: Path) -> dict[str, object]:
    """Medians over the rounds: idle and busy, for both policies; ratio: active / passive when busy."""
    idle = {policy: [decode_ms(path, policy) for _ in range(ROUNDS)] for policy in POLICIES}
    busy: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with busy_loops(usable_cores()):
        for _ in range(ROUNDS):
            for policy in POLICIES:
                busy[policy].append(decode_ms(path, policy))
    ratios = [active / passive for passive, active in zip(busy["passive"], busy["active"], strict=True)]
    return {
        "idle_ms": {policy: round(statistics.median(times), 1) for policy, times in idle.items()},
        "busy_ms": {policy: round(statistics.median(times), 1) for policy, times in busy.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON; exit 1 with one line where it cannot be measured."""
    if arguments[:1] == ["--measure"]:
        print(measure_here(Path(arguments[1])))
        return
    try:
        if arguments:
            print(json.dumps(measure(Path(arguments[0]))))
            return
        with tempfile.TemporaryDirectory(prefix="fourbit-busy-") as folder:
            path = write_replica(model(REPLICA), "Q4_K_M", Path(folder, "replica.gguf"), n_layer=N_LAYER).path
            print(json.dumps(measure(path)))
    except FourbitError as error:
        sys.exit(f"fourbit: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
