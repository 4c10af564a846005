"""What is measured of one file, and how: load, prefill, decode. Runs in the process that is measured.

A case starts with nothing loaded and ends with its memory's peak, so it wants a fresh process
(bench/worker.py). Imports of libraries are timed apart from the load: they are paid once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.probe import memory_split
from engine.gguf_check import check_file
from engine.gguf_header import read_header
from engine.registry import Sampling

if TYPE_CHECKING:
    from engine.native import Context, Model, Sampler

SEED = 1234
SAMPLING = Sampling(temperature=0.8, top_p=0.8)
TTFT_WARMUP = 1  # tokens: pages are mapped and threads exist before the clock starts


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure of one file; n_* are tokens, rounds repetitions inside the process."""

    name: str
    path: str
    n_ctx: int
    n_threads: int
    n_prompt: int = 128
    n_decode: int = 32
    n_warmup: int = 4
    rounds: int = 1
    kv_qtype: str = "F16"


def measure(case: Case) -> dict[str, Any]:
    """Run the case here and now: its figures, the seconds that imports took, and the memory of this process."""
    started = time.perf_counter()
    from engine import native  # noqa: F401

    imported_s = time.perf_counter() - started
    figures = MEASURES[case.name](case)
    split = memory_split()
    return {**figures, "import_s": imported_s, "memory": asdict(split) if split else None}


def prompt_ids(n_prompt: int, n_vocab: int) -> list[int]:
    """Made-up ids, the same in every run, scattered over the vocabulary as those of text are."""
    return [int(id) for id in np.random.default_rng(SEED).integers(0, n_vocab, n_prompt)]


def percentile_ms(times_s: Sequence[float], percent: float) -> float:
    """A percentile of seconds, in milliseconds."""
    return float(np.percentile(times_s, percent)) * 1e3


@contextmanager
def opened(case: Case) -> Iterator[tuple[Model, Context]]:
    """The file, ready to take a prompt, by the steps that the engine takes."""
    from engine import native
    from engine.vocab import spec_of

    path = Path(case.path)
    header = read_header(path)
    check_file(header, spec_of(header))
    with native.Model(path) as model:
        context = native.Context(model, case.n_ctx, n_threads=case.n_threads, kv_qtype=case.kv_qtype)
        try:
            yield model, context
        finally:
            context.close()


def _load(case: Case) -> dict[str, Any]:
    times_s = []
    for _ in range(case.rounds):
        start = time.perf_counter()
        with opened(case):
            times_s.append(time.perf_counter() - start)
    return {"load_s": percentile_ms(times_s, 50) / 1e3, "rounds_s": times_s}


def _prefill(case: Case) -> dict[str, Any]:
    from engine import native

    prefills_s, first_tokens_s = [], []
    with opened(case) as (model, context):
        ids, sampler = prompt_ids(case.n_prompt, model.n_vocab), native.Sampler(context, SAMPLING, SEED)
        context.decode(ids[:TTFT_WARMUP], 0)
        for _ in range(case.rounds):
            context.truncate(0)
            start = time.perf_counter()
            context.decode(ids, 0)
            prefills_s.append(time.perf_counter() - start)
            sampler.sample()
            first_tokens_s.append(time.perf_counter() - start)
        sampler.close()
    return {
        "n_prompt": case.n_prompt,
        "ttft_ms": percentile_ms(first_tokens_s, 50),
        "prefill_tokens_per_s": case.n_prompt * 1e3 / percentile_ms(prefills_s, 50),
        "rounds_s": first_tokens_s,
    }


def _decode(case: Case) -> dict[str, Any]:
    from engine import native

    with opened(case) as (model, context):
        ids, sampler = prompt_ids(case.n_prompt, model.n_vocab), native.Sampler(context, SAMPLING, SEED)
        context.decode(ids, 0)
        times_s = list(decode_times_s(model, context, sampler, case.n_prompt, case.n_warmup + case.n_decode))
        sampler.close()
    steady_s = times_s[case.n_warmup :]
    return {
        "n_decode": len(steady_s),
        "n_past": case.n_prompt + case.n_warmup + case.n_decode // 2,
        "decode_median_ms": percentile_ms(steady_s, 50),
        "decode_p95_ms": percentile_ms(steady_s, 95),
        "tokens_s": steady_s,
    }


def decode_times_s(model: Model, context: Context, sampler: Sampler, n_past: int, n_tokens: int) -> Iterator[float]:
    """Seconds of each token of a reply, from a sampled id to the next one with its text out.

    The context holds n_past tokens and the logits of the last one. Stop ids do not stop it.
    """
    from engine import native, text

    decoder = text.TextDecoder()
    id = sampler.sample()
    for position in range(n_past, n_past + n_tokens):
        start = time.perf_counter()
        context.decode([id], position)
        id = sampler.sample()
        decoder.decode(native.piece(model, id))
        yield time.perf_counter() - start


def _memory(case: Case) -> dict[str, Any]:
    """A prompt and some ids of a reply, for the memory that they take."""
    with opened(case) as (model, context):
        context.decode(prompt_ids(case.n_prompt, model.n_vocab), 0)
        for position in range(case.n_prompt, case.n_prompt + case.n_decode):
            context.decode([7], position)
    return {"n_ctx": case.n_ctx, "kv_qtype": case.kv_qtype}


MEASURES: Mapping[str, Callable[[Case], dict[str, Any]]] = {
    "load": _load,
    "prefill": _prefill,
    "decode": _decode,
    "memory": _memory,
}
