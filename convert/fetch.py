"""A checkpoint from a hub into its folder: only the files that conversion needs, every byte verified.

    .NAME.fetch     a file on its way; the next run goes on at its end
    fetched.json    what each file must be (manifest.py)

ModelScope first, the Hugging Face hub second, or the one that was asked for. A file that one hub
repeatedly fails to give comes from the other, if it has the same bytes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from convert.checkpoint import LAYOUTS
from convert.hub import Listed, list_files
from convert.manifest import Record, read_manifest, write_manifest
from convert.pipeline import Progress
from convert.vocab_files import READERS
from convert.wire import Patience, Place, read
from engine.errors import DoesNotFit, FetchError, OutputError
from engine.host import disk_free_bytes
from engine.registry import Model

SOURCES = ("modelscope", "huggingface")
SPARE_DISK_BYTES = 64 << 20
MAX_TRIES = 2  # of a whole file whose hash comes out wrong
OnProgress = Callable[[Progress], None]


class Mirrors:
    """The hubs that a model may come from, each listed when first needed."""

    def __init__(self, spec: Model, sources: Sequence[str]) -> None:
        self.spec, self._sources = spec, sources
        self._listings: dict[str, Mapping[str, Listed] | FetchError] = {}

    def first(self) -> tuple[str, Mapping[str, Listed]]:
        """The first hub that answers, and what it lists; FetchError with what each of them said."""
        said = []
        for source in self._sources:
            listing = self._listing(source)
            if not isinstance(listing, FetchError):
                return source, listing
            said.append(str(listing))
        raise FetchError("; ".join(said))

    def places(self, record: Record) -> Iterator[Place]:
        """Where a file with exactly these bytes can be had, the hub that it was first seen on before others."""
        for source in sorted(self._sources, key=lambda source: source != record.source):
            listing = self._listing(source)
            found = None if isinstance(listing, FetchError) else listing.get(record.name)
            if found and found.n_bytes == record.n_bytes and _is_same(found, record):
                yield found.place

    def _listing(self, source: str) -> Mapping[str, Listed] | FetchError:
        if source not in self._listings:
            try:
                self._listings[source] = list_files(source, self.spec)
            except FetchError as error:
                self._listings[source] = error
        return self._listings[source]


def fetch(
    spec: Model,
    folder: Path,
    sources: Sequence[str] = SOURCES,
    *,
    weights: bool = True,
    patience: Patience | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Record], Mirrors]:
    """Bring a checkpoint folder to completion; its records, and the hubs that gave them.

    weights=False leaves the weight files on the hub: they are recorded, not fetched.
    Raises FetchError, DoesNotFit or OutputError; what has come stays for the next run.
    """
    if not spec.sources:
        raise FetchError(f"{spec.title} has no checkpoint to fetch: its file comes ready-made")
    with _writing(folder), _locked(folder):
        mirrors = Mirrors(spec, sources)
        records = _planned(spec, folder, mirrors)
        wanted = [r for r in records.values() if weights or not is_weights(r.name)]
        _check_disk(folder, wanted)
        total, done = sum(record.n_bytes for record in wanted), 0
        for record in sorted(wanted, key=lambda record: record.n_bytes):
            if not _is_there(folder, record):
                show = _progress(on_progress, record, done, total)
                records[record.name] = _fetch_file(folder, record, mirrors, patience, show)
                write_manifest(folder, records)
            done += record.n_bytes
    return records, mirrors


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights."""
    return any(name == layout.single or fnmatchcase(name, layout.shards) for layout in LAYOUTS)


def _planned(spec: Model, folder: Path, mirrors: Mirrors) -> dict[str, Record]:
    """What belongs into the folder: as recorded before, else as the first hub that answers lists it."""
    known = read_manifest(folder)
    if known:
        return known
    source, listing = mirrors.first()
    revision = spec.sources[source].revision
    records = {}
    for name in _needed(spec, source, listing):
        file = listing[name]
        sha256 = spec.sha256.get(name, file.sha256)
        if file.sha256 is not None and file.sha256 != sha256:
            raise FetchError(
                f"{name} on {source} has sha256 {file.sha256}, models.toml says {sha256}: use the other --source"
            )
        records[name] = Record(name, file.n_bytes, sha256, file.git_sha1, source, revision)
    write_manifest(folder, records)
    return records


def _needed(spec: Model, source: str, listing: Mapping[str, Listed]) -> list[str]:
    """The names of config, tokenizer, and one set of weights: repositories may hold two."""
    names = ["config.json", READERS[spec.family][0]]
    for layout in LAYOUTS:
        weights = [name for name in listing if name == layout.single or fnmatchcase(name, layout.shards)]
        if weights:
            names += sorted(weights) + [layout.index] * (layout.single not in weights)
            break
    else:
        raise FetchError(f"{source}: {spec.sources[source].repo} holds no weights: use the other --source")
    missing = [name for name in names if name not in listing]
    if missing:
        raise FetchError(f"{source}: {spec.sources[source].repo} has no {missing[0]}: use the other --source")
    return names


def _is_same(found: Listed, record: Record) -> bool:
    """Whether a hub's hash of a file is the recorded one, as far as it gives one of the same kind."""
    if found.sha256 and record.sha256:
        return found.sha256 == record.sha256
    return not (found.git_sha1 and record.git_sha1) or found.git_sha1 == record.git_sha1


def _fetch_file(
    folder: Path, record: Record, mirrors: Mirrors, patience: Patience | None, show: Callable[[int], None]
) -> Record:
    """One file, verified and given its name; the record of what came."""
    part = folder / f".{record.name}.fetch"
    for _ in range(MAX_TRIES):
        sha256, git_sha1 = _download(part, record, mirrors, patience, show)
        if (record.sha256 or sha256) == sha256 and (record.git_sha1 or git_sha1) == git_sha1:
            os.replace(part, folder / record.name)
            return dataclasses.replace(record, sha256=sha256, is_whole=True)
        part.unlink()  # a byte is wrong, and nobody knows which
    raise FetchError(
        f"{record.name}: what came has sha256 {sha256}, it must be {record.sha256 or record.git_sha1}; "
        f"tried {MAX_TRIES} times: use the other --source, or try again later"
    )


def _download(
    part: Path, record: Record, mirrors: Mirrors, patience: Patience | None, show: Callable[[int], None]
) -> tuple[str, str]:
    """Append what is missing of a file; the sha256 and git id of the whole, of what an earlier run left too."""
    digest, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % record.n_bytes, usedforsecurity=False)
    with part.open("a+b") as file:
        if file.tell() > record.n_bytes:
            file.truncate(0)
        file.seek(0)
        position = 0
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            git.update(chunk)
            position += len(chunk)
        show(position)
        for chunk in read(record.name, record.n_bytes, mirrors.places(record), start=position, patience=patience):
            file.write(chunk)
            digest.update(chunk)
            git.update(chunk)
            position += len(chunk)
            show(position)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), git.hexdigest()


def _is_there(folder: Path, record: Record) -> bool:
    path = folder / record.name
    return record.is_whole and path.is_file() and path.stat().st_size == record.n_bytes


def _check_disk(folder: Path, wanted: Sequence[Record]) -> None:
    """DoesNotFit before the first byte, not after the tenth billion."""
    missing = 0
    for record in wanted:
        part = folder / f".{record.name}.fetch"
        here = part.stat().st_size if part.exists() else 0
        missing += 0 if _is_there(folder, record) else max(0, record.n_bytes - here)
    free = disk_free_bytes(folder)
    if missing and free < missing + SPARE_DISK_BYTES:
        raise DoesNotFit(
            f"{folder} needs {missing / 1e9:.2f} GB more of disk, {free / 1e9:.2f} GB are free: make room, "
            "or convert straight from the hub with: fourbit quantize MODEL --stream"
        )


def _progress(on_progress: OnProgress | None, record: Record, done: int, total: int) -> Callable[[int], None]:
    def show(position: int) -> None:
        if on_progress:
            on_progress(Progress(record.name, done + position, total))

    return show


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        hint = (
            "make room and run again, what has come is kept" if error.errno == errno.ENOSPC else "choose FOURBIT_HOME"
        )
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}: {hint}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder / ".fetch.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputError(f"another run is fetching into {folder}: wait for it or stop it, then run again") from None
    finally:
        os.close(fd)
