"""Decode while something else wants the cores: waiting threads that sleep against threads that spin.

`python -m bench.busy [FILE]` prints one JSON line. Each round runs the same reply in a fresh process
for each way to wait, in turns, alone and then beside one busy loop a core. Ours spins for a moment and
then sleeps (engine/native.py); default is what OpenMP does without us. Without a file, on a replica of
four layers. Means over the ids, since the scheduler's moods last for many of them.

A threadpool of llama.cpp's own is no way out: it exists only in builds without OpenMP, whose barrier
(ggml_barrier in ggml-cpu.c) spins without end.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert.replica import write_replica
from engine.errors import FourbitError
from engine.host import usable_cores
from engine.registry import model

REPLICA, N_LAYER = "deepseek-llm-7b-chat", 4
ROUNDS, N_TOKENS = 7, 64
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WAYS: Mapping[str, tuple[Mapping[str, str], int]] = {  # name: settings of OpenMP, threads
    "ours": ({}, usable_cores()),
    "passive": ({"OMP_WAIT_POLICY": "passive"}, usable_cores()),
    "default": ({"GOMP_SPINCOUNT": "300000"}, usable_cores()),  # what libgomp takes where nothing is set
    "active": ({"OMP_WAIT_POLICY": "active"}, usable_cores()),
    "one thread": ({}, 1),
}
Times = Mapping[str, Sequence[float]]


def decode_ms(path: Path, way: str) -> float:
    """Mean ms of an id in a process of its own that waits this way."""
    settings, n_threads = WAYS[way]
    command = [sys.executable, "-m", "bench.busy", "--measure", str(path), str(n_threads)]
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | dict(settings)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout)


def measure_here(path: Path, n_threads: int) -> float:
    """The same in this process."""
    from bench.cases import prompt_ids
    from engine import native

    with native.Model(path) as opened:
        context = native.Context(opened, 256, n_threads=n_threads)
        context.decode(prompt_ids(16, opened.n_vocab), 0)
        times_s = []
        for position in range(16, 16 + N_TOKENS):
            start = time.perf_counter()
            context.decode([7], position)
            times_s.append(time.perf_counter() - start)
        context.close()
    return statistics.mean(times_s[4:]) * 1e3


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def rounds(path: Path, n_loops: int) -> dict[str, list[float]]:
    """ms of every way, taken in turns, each beside so many new busy loops."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for n in range(ROUNDS):
        for way in list(WAYS)[:: -1 if n % 2 else 1]:
            with busy_loops(n_loops):
                found[way].append(decode_ms(path, way))
    return found


def ratio(times: Times, way: str) -> float:
    """Median over the rounds of the time of a way to ours."""
    return round(statistics.median(theirs / ours for theirs, ours in zip(times[way], times["ours"], strict=True)), 2)


def measure(path: Path) -> dict[str, object]:
    """Medians over the rounds, alone and busy; busy_default_to_ours: how many times as fast ours is."""
    idle, busy = rounds(path, 0), rounds(path, usable_cores())
    return {
        "idle_ms": {way: round(statistics.median(times), 1) for way, times in idle.items()},
        "busy_ms": {way: round(statistics.median(times), 1) for way, times in busy.items()},
        "idle_passive_to_ours": ratio(idle, "passive"),
        "busy_default_to_ours": ratio(busy, "default"),
        "busy_active_to_ours": ratio(busy, "active"),
        "busy_one_thread_to_ours": ratio(busy, "one thread"),
        "busy_rounds_ms": {way: [round(ms, 1) for ms in times] for way, times in busy.items()},
    }


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON; exit 1 with one line where it cannot be measured."""
    if arguments[:1] == ["--measure"]:
        print(measure_here(Path(arguments[1]), int(arguments[2])))
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
