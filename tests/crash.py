"""The crash campaign: `python -m tests.crash [--seed N] [--random N] [--every K]`.

A small checkpoint is converted again and again, each time in a process of its own that dies, or
whose disk fails, at one chosen call of the operating system: every k-th for all k, then at random
times by kill -9. After each the final name must be absent, whole, or what it was before; the next
run must finish with the same bytes and leave nothing behind. Prints one JSON object of counts.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.quantize import quantize
from convert.sidecar import sidecar_path
from engine.errors import FourbitError
from tests.checkpoints import make_checkpoint

CALLS = ("pwrite", "write", "fsync", "fdatasync", "replace", "ftruncate", "posix_fallocate", "unlink")
EXIT_REFUSED, EXIT_ODD = 1, 3


@dataclass(slots=True)
class Counts:
    """What happened; everything after n_cases but the completions must be 0."""

    n_calls: int = 0
    n_cases: int = 0
    died: int = 0
    refused: int = 0
    completed: int = 0
    resumed: int = 0
    torn_at_the_final_name: int = 0
    other_errors: int = 0
    other_bytes_after_the_next_run: int = 0
    leftovers: int = 0


class Shim:
    """Counts the calls that change files; does `action` at the k-th."""

    def __init__(self, k: int, action: Callable[[], None]) -> None:
        self.count, self._k, self._action = 0, k, action
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                is_due = self.count == self._k
            if is_due:
                self._action()
            return call(*arguments, **options)

        return counted


def die() -> None:
    """As kill -9 does: no cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[], None]:
    """A disk that is full, or broken."""

    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


ACTIONS = {"kill": die, "ENOSPC": fail(errno.ENOSPC), "EIO": fail(errno.EIO)}


class Campaign:
    """One small checkpoint and the bytes that its conversion must have."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts = folder, Counts()
        self.checkpoint = make_checkpoint(folder / "checkpoint", "deepseek-llm", n_shards=2)
        self.expected = quantize(self.checkpoint, folder / "expected.gguf", "Q4_K_M").path.read_bytes()
        self.out = folder / "out" / "model.gguf"

    def count_calls(self) -> int:
        """How many calls an undisturbed run makes; threads make it vary by a few."""
        shim = Shim(0, die)
        pipe_in, pipe_out = os.pipe()
        pid = os.fork()
        if pid == 0:
            shim.install()
            quantize(self.checkpoint, self.out, "Q4_K_M")
            os.write(pipe_out, str(shim.count).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        self.clear()
        return int(os.read(pipe_in, 100))

    def case(self, shim: Shim | None, kill_after_s: float | None = None) -> None:
        """One disturbed run and the one after it."""
        self.counts.n_cases += 1
        pid = self._start(shim)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._judge(status)
        self.clear()

    def _start(self, shim: Shim | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            if shim:
                shim.install()
            quantize(self.checkpoint, self.out, "Q4_K_M")
            os._exit(0)
        except FourbitError:
            os._exit(EXIT_REFUSED)
        except BaseException:
            os._exit(EXIT_ODD)

    def _judge(self, status: int) -> None:
        counts = self.counts
        if os.WIFSIGNALED(status):
            counts.died += 1
        elif os.WEXITSTATUS(status) == EXIT_REFUSED:
            counts.refused += 1
        elif os.WEXITSTATUS(status):
            counts.other_errors += 1
        if self.out.exists() and self.out.read_bytes() != self.expected:
            counts.torn_at_the_final_name += 1
        try:
            written = quantize(self.checkpoint, self.out, "Q4_K_M")
            counts.resumed += written.n_resumed > 0
        except FourbitError as error:
            if "already there" not in str(error):
                counts.other_errors += 1
        counts.completed += 1
        is_right = self.out.exists() and self.out.read_bytes() == self.expected and sidecar_path(self.out).exists()
        counts.other_bytes_after_the_next_run += not is_right
        known = {self.out.name, sidecar_path(self.out).name}
        counts.leftovers += bool({path.name for path in self.out.parent.iterdir()} - known)

    def clear(self) -> None:
        for path in self.out.parent.iterdir() if self.out.parent.exists() else ():
            path.unlink()


def run(folder: Path, n_random: int, every: int, seed: int) -> Counts:
    """The campaign; every: only each so-many-th call, 1 for all of them."""
    campaign = Campaign(folder)
    campaign.counts.n_calls = campaign.count_calls()
    for action in ACTIONS.values():
        for k in range(1, campaign.counts.n_calls + 1, every):
            campaign.case(Shim(k, action))
    start = time.perf_counter()
    quantize(campaign.checkpoint, campaign.out, "Q4_K_M")
    whole_s = time.perf_counter() - start
    campaign.clear()
    rng = random.Random(seed)
    for _ in range(n_random):
        campaign.case(None, kill_after_s=rng.uniform(0, 1.2 * whole_s))
    return campaign.counts


def is_clean(counts: Counts) -> bool:
    """Whether nothing was lost, torn, odd or left behind."""
    bad = (counts.torn_at_the_final_name, counts.other_errors, counts.other_bytes_after_the_next_run, counts.leftovers)
    return not any(bad) and counts.n_cases > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--random", type=int, default=200, dest="n_random")
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fourbit-crash-") as folder:
        counts = run(Path(folder), arguments.n_random, arguments.every, arguments.seed)
    print(json.dumps(asdict(counts)))
    return 0 if is_clean(counts) else 1


if __name__ == "__main__":
    sys.exit(main())
