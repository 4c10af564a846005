"""How much is measured, and in which order: subjects in, rows out, one file on disk at a time.

cold load, warm load, prefill, decode     each in a fresh process
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.probe import COLD_SHARE, Peak, evict, resident_share, warm
from bench.row import ALLOWANCE_BYTES, Comparison, Row, read_bytes_per_token
from bench.subject import UNQUANTIZED, Pair, Progress, Subject, check_disk, check_memory, is_replica, on_disk
from bench.worker import Outcome, run_case
from engine.errors import FourbitError
from engine.fit import kv_bytes, sizes_of
from engine.gguf_header import read_header
from engine.host import usable_cores

QUICK_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run; n_* are tokens, rounds how often load and prefill are repeated in their process."""

    n_ctx: int = 512
    n_prompt: int = 128
    rounds: int = 3
    n_past: int = 16  # tokens in the context when decoding starts
    n_warmup: int = 4
    n_decode: int = 32
    n_decode_fp16: int = 8
    n_threads: int = field(default_factory=usable_cores)
    read_bytes_per_s: float | None = None
    work: Path | None = None

    def case(self, name: str, path: Path, qtype: str) -> Case:
        """A case of this size on one file."""
        decoding = name == "decode"
        return Case(
            name=name,
            path=str(path),
            n_ctx=self.n_ctx,
            n_threads=self.n_threads,
            n_prompt=self.n_past if decoding else self.n_prompt,
            n_decode=self.n_decode_fp16 if qtype in UNQUANTIZED else self.n_decode,
            n_warmup=self.n_warmup,
            rounds=self.rounds,
        )


def quick(plan: Plan) -> Plan:
    """The same in a fraction of the time, on replicas of QUICK_LAYERS: each thing measured once."""
    return replace(plan, rounds=1, n_decode=16)


@dataclass(frozen=True, slots=True)
class Step:
    """What one case yielded, and what is to know about it."""

    figures: Mapping[str, Any]
    peak: Peak
    notes: tuple[str, ...] = ()


def compare(pairs: Sequence[Pair], plan: Plan, say: Progress) -> list[Comparison]:
    """Measure every pair, quantized first; what cannot be measured becomes a row with the reason."""
    return [
        Comparison(
            pair.model,
            measure(pair.quantized, plan, say) if pair.quantized else None,
            measure(pair.fp16, plan, say) if pair.fp16 else None,
        )
        for pair in pairs
    ]


def with_bandwidth(comparison: Comparison, read_bytes_per_s: float) -> Comparison:
    """The same rows, their shares of this bandwidth instead."""

    def updated(row: Row | None) -> Row | None:
        if row is None or not row.read_bytes_per_token:
            return row
        share = _share(row.read_bytes_per_token, row.decode_median_ms, read_bytes_per_s)
        return replace(row, bandwidth_share=share)

    return replace(comparison, quantized=updated(comparison.quantized), fp16=updated(comparison.fp16))


def measure(subject: Subject, plan: Plan, say: Progress) -> Row:
    """The row of one subject; its replica, if one is made, is gone afterwards."""
    blank = Row(subject.model, subject.key, subject.qtype, replica=subject.path is None, n_layer=subject.n_layer)
    try:
        check_memory(subject, plan.n_ctx)
        check_disk(subject, plan.work)
        with on_disk(subject, plan.work, say) as path:
            return _row(blank, path, plan, say)
    except FourbitError as error:
        say(f"{subject.model} {subject.qtype}: not measured: {error}")
        return replace(blank, skipped=str(error))


def _row(blank: Row, path: Path, plan: Plan, say: Progress) -> Row:
    header = read_header(path)
    steps = {}
    for name, run in STEPS.items():
        say(f"{blank.model} {blank.label}: {name.replace('_', ' ')}")
        steps[name] = run(path, plan, blank.qtype)
    figures = {name: value for step in steps.values() for name, value in step.figures.items()}
    shown: dict[str, Any] = {name: figures.get(name) for name in SHOWN}
    peaks = [step.peak for step in steps.values()]
    read_bytes = read_bytes_per_token(header) + kv_bytes(sizes_of(header), figures.get("n_past", plan.n_past), "F16")
    return replace(
        blank,
        replica=is_replica(header),
        notes=tuple(note for step in steps.values() for note in step.notes),
        file_bytes=header.file_bytes,
        peak_rss_bytes=max(peak.rss_bytes for peak in peaks),
        peak_private_bytes=max(peak.private_bytes for peak in peaks),
        peak_file_bytes=max(peak.file_bytes for peak in peaks),
        predicted_peak_bytes=header.file_bytes + kv_bytes(sizes_of(header), plan.n_ctx, "F16") + ALLOWANCE_BYTES,
        read_bytes_per_token=read_bytes,
        bandwidth_share=_share(read_bytes, figures.get("decode_median_ms"), plan.read_bytes_per_s),
        cases={name: {**step.figures, "peak": asdict(step.peak)} for name, step in steps.items()},
        **shown,
    )


def _load_cold(path: Path, plan: Plan, qtype: str) -> Step:
    """A load after eviction; only called cold if the page cache says that it was."""
    share = evict(path)
    step = _step("load, cold", run_case(replace(plan.case("load", path, qtype), rounds=1)))
    load_s = step.figures.get("load_s")
    if load_s is None or (share is not None and share <= COLD_SHARE):
        return replace(step, figures={**step.figures, "load_cold_s": load_s, "resident_share": share})
    state = "how much was cached cannot be told here" if share is None else f"{share:.0%} of the file stayed cached"
    note = f"no cold load: {state} after eviction; loading took {load_s:.2f} s"
    return replace(step, figures={**step.figures, "resident_share": share}, notes=(*step.notes, note))


def _load_warm(path: Path, plan: Plan, qtype: str) -> Step:
    share = resident_share(path)
    if share is None or share < 1 - COLD_SHARE:
        share = warm(path)
    step = _step("load, warm", run_case(plan.case("load", path, qtype)))
    figures = {**step.figures, "load_warm_s": step.figures.get("load_s"), "resident_share": share}
    short = share is not None and share < 1 - COLD_SHARE
    note = f"warm load: only {share:.0%} of the file stays in the page cache"
    return replace(step, figures=figures, notes=(*step.notes, *([note] if short else [])))


def _prefill(path: Path, plan: Plan, qtype: str) -> Step:
    return _step("prefill", run_case(plan.case("prefill", path, qtype)))


def _decode(path: Path, plan: Plan, qtype: str) -> Step:
    return _step("decode", run_case(plan.case("decode", path, qtype)))


STEPS: Mapping[str, Callable[[Path, Plan, str], Step]] = {
    "load_cold": _load_cold,
    "load_warm": _load_warm,
    "prefill": _prefill,
    "decode": _decode,
}
SHOWN = (
    "load_cold_s",
    "load_warm_s",
    "n_prompt",
    "ttft_ms",
    "prefill_tokens_per_s",
    "n_decode",
    "decode_median_ms",
    "decode_p95_ms",
)


def _step(title: str, outcome: Outcome) -> Step:
    notes = (f"{title}: {outcome.error}",) if outcome.error else ()
    return Step(outcome.figures or {}, outcome.peak, notes)


def _share(read_bytes: int, decode_ms: float | None, read_bytes_per_s: float | None) -> float | None:
    """What one token reads over its time, as a share of the bandwidth that this machine measured."""
    if not decode_ms or not read_bytes_per_s:
        return None
    return read_bytes / (decode_ms / 1e3) / read_bytes_per_s
