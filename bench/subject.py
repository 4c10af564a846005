"""What is measured: a GGUF file at hand, or a replica that exists only while it is measured.

WORK/fourbit-bench-PID/qwen-7b-chat-F16.gguf    deleted after its row, on failure and on Ctrl-C too
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from gguf.constants import LlamaFileType

from convert.output_file import SPARE_DISK_BYTES
from convert.replica import replica_shape, replica_slots, write_replica
from engine import fit
from engine.errors import DoesNotFit
from engine.gguf_header import Header, read_header
from engine.home import home, model_file
from engine.host import disk_free_bytes, memory
from engine.registry import Model, models

UNQUANTIZED = ("F16", "BF16", "F32")
FP16 = "F16"
FOLDER = "fourbit-bench-"
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A file to measure: `path` if it is at hand, else the `spec` whose replica is made, of n_layer layers."""

    model: str
    qtype: str
    path: Path | None = None
    spec: Model | None = None
    n_layer: int | None = None

    @property
    def key(self) -> str | None:
        return self.spec.key if self.spec else None


@dataclass(frozen=True, slots=True)
class Pair:
    """What stands side by side: one model quantized and in fp16."""

    model: str
    quantized: Subject | None
    fp16: Subject | None


def pair_of_model(spec: Model, qtype: str, n_layer: int | None) -> Pair:
    """A model of the registry: files of the models folder, replicas where there are none or few layers are asked."""
    return Pair(spec.title, *(_of_model(spec, kind, n_layer) for kind in (qtype, FP16)))


def _of_model(spec: Model, qtype: str, n_layer: int | None) -> Subject:
    path = model_file(spec, qtype)
    at_hand = n_layer is None and path.is_file()
    return Subject(spec.title, qtype, path if at_hand else None, spec, n_layer)


def pairs_of_files(paths: Sequence[Path]) -> list[Pair]:
    """GGUF files as given: those of one name and architecture side by side, two by two, the rest alone."""
    waiting: dict[tuple[str, bool], list[Subject]] = {}
    for path in paths:
        subject = _of_file(path)
        waiting.setdefault((subject.model, subject.qtype in UNQUANTIZED), []).append(subject)
    pairs = []
    for name in dict.fromkeys(name for name, _ in waiting):
        quantized, fp16 = waiting.get((name, False), []), waiting.get((name, True), [])
        for i in range(max(len(quantized), len(fp16))):
            pairs.append(Pair(name, *(side[i] if i < len(side) else None for side in (quantized, fp16))))
    return pairs


def _of_file(path: Path) -> Subject:
    header = read_header(path)
    spec = models().get(str(header.metadata.get("fourbit.model")))
    return Subject(str(header.metadata.get("general.name", path.stem)), file_qtype(header), path, spec)


def file_qtype(header: Header) -> str:
    """The type that a file says it is of: Q4_K_M, F16, …

    Source: general.file_type of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    number = header.metadata.get("general.file_type")
    known = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return known.get(number, f"file type {number}") if isinstance(number, int) else "of no stated type"


def is_replica(header: Header) -> bool:
    """Whether a file says of itself that its weights are made up."""
    return bool(header.metadata.get("fourbit.replica", False))


@contextmanager
def on_disk(subject: Subject, work: Path | None, say: Progress) -> Iterator[Path]:
    """The subject's file while it is measured; a replica is gone afterwards. DoesNotFit, OutputError."""
    if subject.path is not None:
        yield subject.path
        return
    assert subject.spec is not None
    folder = replica_folder(work)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{subject.spec.key}-{subject.qtype}.gguf"
        say(f"{subject.model} {subject.qtype}: writing a replica")
        write_replica(subject.spec, subject.qtype, path, n_layer=subject.n_layer)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replica_folder(work: Path | None) -> Path:
    """This process's folder for replicas, under `work` or the models folder; those of dead processes are removed."""
    parent = work or home()
    for stale in parent.glob(f"{FOLDER}*"):
        number = stale.name.removeprefix(FOLDER)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(stale, ignore_errors=True)
    return parent / f"{FOLDER}{psutil.Process().pid}"


def check_memory(subject: Subject, n_ctx: int) -> None:
    """DoesNotFit with what running the subject needs and what there is, before any file is made."""
    if subject.path is not None:
        fit.check(read_header(subject.path), n_ctx, memory())
        return
    assert subject.spec is not None
    weight_bytes = sum(slot.n_bytes for slot in replica_slots(subject.spec, subject.qtype, subject.n_layer))
    shape = replica_shape(subject.spec, subject.n_layer)
    found = fit.estimate(shape, weight_bytes, n_ctx, memory())
    if found.needed_bytes > found.available_bytes:
        raise DoesNotFit(
            f"needs {found.needed_bytes / 1e9:.1f} GB of memory, {found.available_bytes / 1e9:.1f} GB are free"
        )


def check_disk(subject: Subject, work: Path | None) -> None:
    """DoesNotFit where the subject's replica has no room where it is to be made."""
    if subject.path is not None:
        return
    assert subject.spec is not None
    needed = sum(slot.n_bytes for slot in replica_slots(subject.spec, subject.qtype, subject.n_layer))
    free = disk_free_bytes(work or home())
    if free < needed + SPARE_DISK_BYTES:
        raise DoesNotFit(
            f"its replica needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: "
            "make room, or choose another place with --work"
        )
