"""Which settings are fastest for one file on this machine, by interleaved measurement within a minute.

Candidates of one kind take turns, so that a busy moment falls on all alike; medians decide, and a
setting other than the default must win by LEAST_GAIN. Nothing is chosen by counting cores alone.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.cases import prompt_ids
from bench.probe import memory_split
from engine import fit, native
from engine.gguf_check import check_file
from engine.gguf_header import Header, read_header
from engine.host import memory, usable_cores
from engine.pages import release_repacked
from engine.settings import Settings, defaults
from engine.vocab import spec_of

N_CTX, N_PAST = 1024, 32
LEAST_GAIN = 1.03
LEAST_GAIN_REPACKED = 1.10  # seconds of loading and gigabytes of private memory have to be paid for
LEAST_ROUNDS, MOST_ROUNDS = 3, 12
N_PREFILL = 32
BUDGET_S = 60.0
Key = TypeVar("Key")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """One setting measured: ms of an id, tokens a second of a prompt, and what it is."""

    name: str
    decode_ms: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Released:
    """Resident memory with repacked weights twice, and after the file's copies were given back."""

    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The settings chosen, every measurement by its question, and llama-cpp-python's defaults beside them."""

    settings: Settings
    tables: Mapping[str, Mapping[str, float]]
    tuned: Timing
    stock: Timing | None
    stock_load_s: float | None
    released: Released | None
    seconds_s: float


class Tuner:
    """Measures one file; every step has its share of the budget and is left out, and said so, when it is used up."""

    def __init__(self, path: Path, budget_s: float = BUDGET_S, say: Say = lambda _: None) -> None:
        self.header = read_header(path)
        check_file(self.header, spec_of(self.header))
        self.settings = defaults()
        fit.check(self.header, N_CTX, memory(), self.settings)
        self._start = time.monotonic()
        self._budget_s, self._say = budget_s, say
        self._tables: dict[str, dict[str, float]] = {}

    def run(self) -> Outcome:
        """All steps; the file is closed again afterwards."""
        with native.Model(self.header.path) as model:
            with _context(model, self.settings) as context:
                self._threads(context)
            self._batches(model)
            self._flash_attention(model)
            tuned, stock, load_s, released = self._repacking(model)
        return Outcome(self.settings, self._tables, tuned, stock, load_s, released, time.monotonic() - self._start)

    def _left_s(self) -> float:
        return self._budget_s - (time.monotonic() - self._start)

    def _choose(
        self, question: str, default: Key, times_s: Mapping[Key, Sequence[float]], least_gain: float = LEAST_GAIN
    ) -> Key:
        """The fastest by median, unless the default is as good as that."""
        medians = {key: statistics.median(times) for key, times in times_s.items()}
        self._tables[question] = {str(key): round(value * 1e3, 2) for key, value in medians.items()}
        best = min(medians, key=medians.__getitem__)
        chosen = best if medians[default] > least_gain * medians[best] else default
        self._say(f"{question}: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in medians.items()) + f" -> {chosen}")
        return chosen

    def _threads(self, context: native.Context) -> None:
        candidates, cores = thread_counts(), self.settings.n_threads
        decode = interleaved(
            {n: functools.partial(decode_s, context, n) for n in candidates},
            0.08 * self._budget_s,
        )
        n_decode = self._choose("threads for decode", cores, decode)
        prefill = interleaved(
            {n: functools.partial(prefill_s, context, n) for n in candidates},
            0.10 * self._budget_s,
            least_rounds=2,
        )
        n_prefill = self._choose("threads for prefill", cores, prefill)
        self.settings = self.settings.changed(n_threads=n_decode, n_threads_batch=n_prefill)

    def _batches(self, model: native.Model) -> None:
        """Prompts of 256 ids cut into batches of several sizes."""
        if self._left_s() < 0.5 * self._budget_s:
            self._say("batch size: no time left, as it is")
            return
        contexts = {n: _made(model, self.settings.changed(n_batch=n)) for n in (128, 256)}
        threads = self.settings.n_threads_batch
        times = interleaved(
            {n: functools.partial(prefill_s, c, threads, 256) for n, c in contexts.items()},
            0.10 * self._budget_s,
            least_rounds=1,
        )
        for context in contexts.values():
            context.close()
        self.settings = self.settings.changed(n_batch=self._choose("batch", self.settings.n_batch, times))

    def _flash_attention(self, model: native.Model) -> None:
        if self._left_s() < 0.3 * self._budget_s:
            self._say("flash attention: no time left, as it is")
            return
        names = ("auto", "off")  # "auto" is on wherever this llama.cpp can
        contexts = {name: _made(model, self.settings.changed(flash_attention=name)) for name in names}
        for context in contexts.values():
            context.truncate(0)
            context.decode(prompt_ids(64, model.n_vocab), 0)
        threads = self.settings.n_threads
        times = interleaved(
            {k: functools.partial(decode_s, c, threads, n_past=64) for k, c in contexts.items()},
            0.05 * self._budget_s,
        )
        for context in contexts.values():
            context.close()
        self.settings = self.settings.changed(flash_attention=self._choose("flash attention", "auto", times))

    def _repacking(self, model: native.Model) -> tuple[Timing, Timing | None, float | None, Released | None]:
        """With llama.cpp's private copies and without; stock is the copies with llama-cpp-python's other defaults."""
        plain = _made(model, self.settings)
        if not fits_twice(self.header) or self._left_s() < 0.2 * self._budget_s:
            self._say("repacking: no memory or no time for it, left off")
            tuned = timing("tuned", plain, self.settings)
            plain.close()
            return tuned, None, None, None
        start = time.perf_counter()
        with native.Model(self.header.path, repack=True) as copies:
            stock_settings = stock_defaults()
            with _context(copies, stock_settings) as stock_context:
                load_s = time.perf_counter() - start
                stock = timing("llama-cpp-python's defaults", stock_context, stock_settings)
            released = _release(self.header)
            packed = _made(copies, self.settings.changed(repack=True))
            contexts = {False: plain, True: packed}
            n, batch = self.settings.n_threads, self.settings.n_threads_batch
            steps = {key: functools.partial(turn_s, context, n, batch) for key, context in contexts.items()}
            times = interleaved(steps, 0.04 * self._budget_s, least_rounds=2)
            repack = self._choose("repacking (a turn of 128 + 128)", False, times, LEAST_GAIN_REPACKED)
            self.settings = self.settings.changed(repack=repack)
            tuned = timing("tuned", contexts[self.settings.repack], self.settings)
            packed.close()
        plain.close()
        return tuned, stock, load_s, released


def thread_counts() -> list[int]:
    """Candidates up to what this process may use: 1, 2, 4, … and both kinds of cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, min(allowed, 2 * usable_cores()))
    return sorted({1, usable_cores(), most, *(n for n in (2, 4, 6, 8, 12, 16) if n <= most)})


def interleaved(
    steps: Mapping[Key, Callable[[], float]], slice_s: float, least_rounds: int = LEAST_ROUNDS
) -> dict[Key, list[float]]:
    """Seconds of each step, taken in turns until its slice of time is used; the first round only warms up."""
    found: dict[Key, list[float]] = {key: [] for key in steps}
    end = time.monotonic() + slice_s
    if least_rounds > 1:
        for step in steps.values():
            step()
    for n in range(MOST_ROUNDS):
        if n >= least_rounds and time.monotonic() > end:
            break
        for key in list(steps)[:: -1 if n % 2 else 1]:
            found[key].append(steps[key]())
    return found


def decode_s(context: native.Context, n_threads: int, n_past: int = N_PAST) -> float:
    """Seconds of one id after n_past others."""
    context.set_threads(n_threads, n_threads)
    context.truncate(n_past)
    start = time.perf_counter()
    context.decode([7], n_past)
    return time.perf_counter() - start


def prefill_s(context: native.Context, n_threads: int, n_prompt: int = N_PREFILL) -> float:
    """Seconds of a prompt from the start."""
    ids = prompt_ids(n_prompt, context.model.n_vocab)
    context.set_threads(n_threads, n_threads)
    context.truncate(0)
    start = time.perf_counter()
    context.decode(ids, 0)
    seconds_s = time.perf_counter() - start
    if n_prompt < N_PAST:
        raise ValueError(f"{n_prompt} ids leave nothing to decode after")
    return seconds_s


def turn_s(context: native.Context, n_threads: int, n_threads_batch: int) -> float:
    """Seconds of a turn of 128 ids of prompt and 128 of reply, from one of each."""
    return 128 / N_PREFILL * prefill_s(context, n_threads_batch) + 128 * decode_s(context, n_threads)


def timing(name: str, context: native.Context, settings: Settings) -> Timing:
    """Median of some ids and of a prompt or two."""
    prefills = [prefill_s(context, settings.n_threads_batch) for _ in range(2)]
    decodes = [decode_s(context, settings.n_threads) for _ in range(6)][1:]
    return Timing(name, statistics.median(decodes) * 1e3, N_PREFILL / min(prefills))


def stock_defaults() -> Settings:
    """What llama-cpp-python's Llama() takes: half of the cores, batches of 512, repacking, no flash attention."""
    half = max((os.cpu_count() or 2) // 2, 1)
    return Settings(half, os.cpu_count() or 1, 512, True, "off")


def fits_twice(header: Header) -> bool:
    """Whether memory holds the weights in both forms."""
    found = fit.fit(header, N_CTX, memory())
    return found.needed_bytes + found.weight_bytes <= found.available_bytes


def _release(header: Header) -> Released | None:
    before = memory_split()
    release_repacked(header)
    after = memory_split()
    return Released(before.rss_bytes, after.rss_bytes) if before and after else None


def _made(model: native.Model, settings: Settings) -> native.Context:
    context = native.Context(
        model,
        N_CTX,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads_batch,
        n_batch=settings.n_batch,
        flash_attention=settings.flash_attention,
    )
    context.decode(prompt_ids(N_PREFILL, model.n_vocab), 0)
    return context


@contextmanager
def _context(model: native.Model, settings: Settings) -> Iterator[native.Context]:
    context = _made(model, settings)
    try:
        yield context
    finally:
        context.close()


def tune(path: Path, budget_s: float = BUDGET_S, say: Say = lambda _: None) -> Outcome:
    """Measure a file; raises as Engine.open() does where it cannot be opened."""
    return Tuner(path, budget_s, say).run()
