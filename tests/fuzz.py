"""The hostile-input campaign: `python -m tests.fuzz [--seconds N] [--seed N] [--jobs N] [TARGET...]`.

Mutates what is parsed, then what was written: a safetensors header, a torch shard, a GGUF file;
asks our readers, and counts. Each worker is a process under a memory limit, an alarm and an audit
hook; the GGUF files that are accepted are given to libllama in a process of their own. Prints one
JSON object a target; every count of harm must be 0.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.quantize import quantize
from convert.safetensors_shard import read_safetensors
from convert.shard import LocalShard
from convert.torch_shard import read_torch_bin
from engine.errors import FourbitError, GGUFError
from engine.gguf_check import check_file
from engine.gguf_header import read_header
from engine.registry import models
from engine.vocab import spec_of
from tests.checkpoints import SHAPES, make_checkpoint, torch_pickle, write_zip
from tests.gadgets import GADGETS

HANG_S, GROWTH_BYTES, ADDRESS_BYTES = 2.0, 64 << 20, 1 << 30
NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40)
NUMBERS += ((1 << 60) - 1, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 32)
FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "os.mkdir")
HARM = ("crash", "hang", "execution", "over_allocation", "odd_error", "disagreement", "escape")
Mutant = Callable[[random.Random], bytes]
Case = Callable[[Path], None]


# --- safetensors ---------------------------------------------------------------------------------

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I8", "shape": [], "data_offsets": [32, 33]},
    "d": {"dtype": "F16", "shape": [0, 9], "data_offsets": [33, 33]},
}
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 1.5, 1e309, "x", [], {}, [[1]], [1] * 9, "F64", "F8_E8M0", "C64")


def safetensors_mutant(rng: random.Random) -> bytes:
    """A file after one to three changes of its structure, or of its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, **{k: dict(v) for k, v in TENSORS.items()}}
    n_data = 33
    for _ in range(rng.randint(0, 2)):
        name = rng.choice([*TENSORS])
        entry = header.get(name)
        kind = rng.randrange(9)
        if kind == 0 or not isinstance(entry, dict):
            header[rng.choice([name, "e", "", "__metadata__"])] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 1:
            entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        elif kind == 2:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 4))]
        elif kind == 3:
            entry["dtype"] = rng.choice(["F64", "I64", "U8", "BOOL", "F8_E4M3", "Q4", "f32", 7])
        elif kind == 4:
            entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 5:
            entry.pop(rng.choice([*entry]) if entry else "", None)
        elif kind == 6:
            header.pop(name)
        elif kind == 7:
            n_data = rng.randint(0, 40)
        else:
            header["__metadata__"] = rng.choice([{}, {"a": 1}, {"a": "b"}, [], None, {"a": {}}])
    text = json.dumps(header)
    if rng.random() < 0.1:
        text = rng.choice([text[:-1], text + "}", "\ufeff" + text, " " + text, text + " " * 7, "[" * 2000, text * 2])
    if rng.random() < 0.1:
        text = text.replace('"b"', '"a"', 1)
    raw = text.encode("utf-8", errors="surrogatepass")
    length = rng.choice(NUMBERS) if rng.random() < 0.05 else len(raw)
    data = struct.pack("<Q", length % (1 << 64)) + raw + bytes(n_data)
    return flipped(data, rng) if rng.random() < 0.4 else data


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut or added at random."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, kind = rng.randrange(len(changed) or 1), rng.randrange(4)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed[place:place] = rng.randbytes(rng.randint(1, 9))
        elif changed:
            changed[place % len(changed)] = rng.choice([rng.randrange(256), 0, 0x22, 0x7B, 0xFF])
    return bytes(changed)


# dtypes that no checkpoint of ours has; more than 8 dimensions; one above 2^40; keys that the format does not have
STRICTER = ("unknown dtype", "short list", "outside 0 to", "not exactly a dtype")


def judge_safetensors(path: Path) -> str:
    """Our verdict, held against the official package's."""
    from safetensors import SafetensorError, deserialize

    data = path.read_bytes()
    try:
        deserialize(data)
        theirs = True
    except SafetensorError:
        theirs = False
    try:
        found = read_safetensors(LocalShard(path))
    except FourbitError as error:
        if not theirs:
            return "refused"
        return "stricter" if any(words in str(error) for words in STRICTER) else "disagreement"
    assert all(t.offset + t.n_bytes <= len(data) for t in found.values())
    return "accepted" if theirs else "disagreement"


# --- torch .bin ----------------------------------------------------------------------------------


def bin_seed() -> tuple[bytes, bytes]:
    import numpy as np

    weights = {"a": np.ones((2, 3), np.float32), "b.weight": np.ones(4, np.float32)}
    return torch_pickle(weights, "F32"), bytes(24)


def bin_mutant(rng: random.Random, folder: Path) -> bytes:
    """A shard whose pickle or zip was changed; gadgets spliced in at any opcode."""
    pickle, storage = bin_seed()
    kind = rng.randrange(5)
    if kind == 0:
        place, gadget = rng.randrange(len(pickle)), rng.choice(GADGETS)
        pickle = pickle[:place] + gadget.data + pickle[place:]
    elif kind == 1:
        pickle = rng.choice(GADGETS).data
    elif kind == 2:
        pickle = flipped(pickle, rng)
    entries = {"data.pkl": pickle, "byteorder": b"little", "data/0": storage, "data/1": bytes(16), "version": b"3\n"}
    if kind == 3:
        name = rng.choice([*entries])
        entries[rng.choice(["data/0", "../x", "data.pkl2", "/abs", "data/\u4e2d", name])] = entries.pop(name)
    write_zip(folder / "seed", entries, stem=rng.choice(["archive", "archive", "a/b", ""]))
    data = (folder / "seed").read_bytes()
    return flipped(data, rng) if kind == 4 or rng.random() < 0.2 else data


def judge_bin(path: Path) -> str:
    size = path.stat().st_size
    try:
        found = read_torch_bin(LocalShard(path))
    except FourbitError:
        return "refused"
    assert all(t.offset >= 0 and t.offset + t.n_bytes <= size for t in found.values())
    return "accepted"


# --- GGUF ----------------------------------------------------------------------------------------


class GGUFSeed:
    """A small whole file, and where each field of its header lies."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.header_end = read_header(path).data_offset
        self.fields = list(_fields(self.data))

    def mutant(self, rng: random.Random) -> bytes:
        """One to three fields set to numbers that hurt, or bytes of the header changed."""
        data = bytearray(self.data)
        if rng.random() < 0.1:
            return bytes(data[: rng.randrange(len(data))])
        for _ in range(rng.randint(1, 3)):
            offset, form, kind = rng.choice(self.fields)
            if kind == "text":
                data[offset] = rng.randrange(256)
            elif form == "<f":
                struct.pack_into("<f", data, offset, rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e-6, 1e4]))
            else:
                limit = 1 << (8 * struct.calcsize(form))
                old = struct.unpack_from(form.upper(), data, offset)[0]
                new = rng.choice([*NUMBERS, old + 1, old - 1, old * 2, old // 2, rng.randrange(20)]) % limit
                struct.pack_into(form.upper(), data, offset, new)
        return bytes(data)


def _fields(data: bytes) -> Iterator[tuple[int, str, str]]:
    """Offset, struct format and kind of every number and of some letters of a header."""
    n_tensors, n_kv = struct.unpack_from("<QQ", data, 8)
    yield from ((4, "<I", "version"), (8, "<Q", "count"), (16, "<Q", "count"))
    offset = 24
    scalars = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}

    def string(at: int) -> tuple[list[tuple[int, str, str]], int]:
        length = struct.unpack_from("<Q", data, at)[0]
        letters = [(at + 8 + i, "<B", "text") for i in range(0, length, 5)]
        return [(at, "<Q", "length"), *letters], at + 8 + length

    for _ in range(n_kv):
        found, offset = string(offset)
        yield from found
        kind = struct.unpack_from("<I", data, offset)[0]
        yield offset, "<I", "type"
        offset += 4
        if kind == 8:
            found, offset = string(offset)
            yield from found[:3]
        elif kind == 9:
            inner, count = struct.unpack_from("<IQ", data, offset)
            yield from ((offset, "<I", "type"), (offset + 4, "<Q", "count"))
            offset += 12
            for i in range(count):
                if inner == 8:
                    found, offset = string(offset)
                    yield from found[: 2 if i % 16 == 0 else 0]
                else:
                    if i % 16 == 0:
                        yield offset, scalars[inner], "element"
                    offset += struct.calcsize(scalars[inner])
        else:
            yield offset, scalars[kind], "value"
            offset += struct.calcsize(scalars[kind])
    for _ in range(n_tensors):
        found, offset = string(offset)
        yield from found
        n_dims = struct.unpack_from("<I", data, offset)[0]
        yield offset, "<I", "dims"
        yield from ((offset + 4 + 8 * i, "<Q", "shape") for i in range(n_dims))
        offset += 4 + 8 * n_dims
        yield from ((offset, "<I", "type"), (offset + 4, "<Q", "offset"))
        offset += 12


def judge_gguf(path: Path) -> str:
    try:
        header = read_header(path)
        check_file(header, spec_of(header))
    except GGUFError:
        return "refused"
    size = path.stat().st_size
    assert all(t.offset + t.n_bytes <= size for t in header.tensors)
    return "accepted"


def gguf_seeds(folder: Path) -> list[GGUFSeed]:
    """One tiny file a family."""
    seeds = []
    for family, shape in SHAPES.items():
        n_vocab = 700 if family == "deepseek-llm" else 720
        small = replace(shape, n_layer=1, n_embd=32, n_head=4, n_ff=32, n_vocab=n_vocab)
        checkpoint = make_checkpoint(folder / family, family, shape=small)
        seeds.append(GGUFSeed(quantize(checkpoint, folder / f"{family}.gguf", "F16").path))
    return seeds


def load_with_libllama(path: Path) -> None:
    """What the engine would do with an accepted file: load, tokenize, evaluate, spell."""
    from engine import native

    model = native.Model(path)
    ids = native.tokenize(model, "hello \u4e16\u754c <|im_end|> 123") or [1]
    context = native.Context(model, 64, n_threads=1, n_batch=16)
    context.decode(ids[:16], 0)
    context.logits()
    for id in range(0, model.n_vocab, 37):
        native.piece(model, id)
    model.close()


# --- workers -------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case took too long."""


def guard(counts: collections.Counter[str]) -> None:
    """Memory limit, alarm and audit hook of a worker."""

    def on_alarm(*_: object) -> None:
        raise Hang

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) and guard.is_on:  # type: ignore[attr-defined]
            counts["execution"] += 1
            print(f"execution: {event} {arguments!r:.200}", file=sys.stderr)

    guard.is_on = False  # type: ignore[attr-defined]
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, on_alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_BYTES, used + ADDRESS_BYTES))


def attempt(judge: Callable[[Path], str], path: Path, counts: collections.Counter[str]) -> str:
    """One case: its verdict, or what harm it did."""
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    guard.is_on = True  # type: ignore[attr-defined]
    try:
        verdict = judge(path)
    except Hang:
        verdict = "hang"
    except MemoryError:
        verdict = "over_allocation"
    except Exception:
        verdict = "odd_error"
    finally:
        guard.is_on = False  # type: ignore[attr-defined]
        signal.setitimer(signal.ITIMER_REAL, 0)
    counts[verdict] += 1
    counts["cases"] += 1
    if verdict in HARM:
        (Path(tempfile.gettempdir()) / f"fuzz-{verdict}-{counts[verdict]}").write_bytes(path.read_bytes())
    return verdict


def work(target: str, seed: int, deadline: float, folder: Path, found: Any, limit: int) -> None:
    """Cases of one target until the deadline; counts go into the queue every so often."""
    rng, counts, path = random.Random(seed), collections.Counter[str](), folder / f"case-{os.getpid()}"
    own = folder / f"own-{os.getpid()}"
    own.mkdir()
    seeds = gguf_seeds(own) if target == "gguf" else []
    judges = {"safetensors": judge_safetensors, "bin": judge_bin, "gguf": judge_gguf}
    makers: dict[str, Mutant] = {
        "safetensors": safetensors_mutant,
        "bin": lambda rng: bin_mutant(rng, own),
        "gguf": lambda rng: rng.choice(seeds).mutant(rng),
    }
    for data in (makers[target](rng) for _ in range(300)):  # what is imported lazily is imported now
        path.write_bytes(data)
        with _suppressed():
            judges[target](path)
    guard(counts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_kept = 0
    while time.monotonic() < deadline and counts["cases"] < limit:
        path.write_bytes(makers[target](rng))
        verdict = attempt(judges[target], path, counts)
        if target == "gguf" and verdict == "accepted" and n_kept < 20_000:
            path.rename(folder / f"accepted-{os.getpid()}-{n_kept}")
            n_kept += 1
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    counts["over_allocation"] += growth > GROWTH_BYTES
    found.put(dict(counts))


def _suppressed() -> Any:
    import contextlib

    return contextlib.suppress(FourbitError)


def run_target(target: str, seconds: float, seed: int, n_jobs: int, limit: int) -> dict[str, int]:
    """The counts of one target."""
    context = multiprocessing.get_context("spawn")
    total: collections.Counter[str] = collections.Counter(dict.fromkeys(("cases", *HARM), 0))
    room = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fourbit-fuzz-", dir=room) as name:
        folder, found = Path(name), context.SimpleQueue()
        share = 0.6 if target == "gguf" else 1.0
        deadline = time.monotonic() + share * seconds
        each = -(-limit // n_jobs)
        workers = [
            context.Process(target=work, args=(target, seed * 1000 + i, deadline, folder, found, each))
            for i in range(n_jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            if worker.exitcode == 0:
                total.update(found.get())
            else:
                total["crash"] += 1
        if target == "gguf":
            total.update(load_accepted(sorted(folder.glob("accepted-*")), (1 - share) * seconds, n_jobs))
    return dict(total)


def load_accepted(paths: list[Path], seconds: float, n_jobs: int) -> dict[str, int]:
    """Give accepted files to libllama, each process until one of them ends it: that file is an escape."""
    counts: collections.Counter[str] = collections.Counter(loaded=0, escape=0)
    waiting, deadline = collections.deque(paths), time.monotonic() + seconds
    running: dict[int, tuple[int, list[Path]]] = {}
    while (waiting or running) and (time.monotonic() < deadline or running):
        while waiting and len(running) < n_jobs and time.monotonic() < deadline:
            batch = [waiting.popleft() for _ in range(min(200, len(waiting)))]
            pid, reader = _start_loader(batch, deadline)
            running[pid] = (reader, batch)
        pid, status = os.wait()
        reader, batch = running.pop(pid)
        n_loaded = len(os.read(reader, 1 << 16))
        os.close(reader)
        counts["loaded"] += n_loaded
        if os.WIFSIGNALED(status):
            counts["escape"] += 1
            culprit = batch[n_loaded]
            (Path(tempfile.gettempdir()) / f"fuzz-escape-{counts['escape']}.gguf").write_bytes(culprit.read_bytes())
            waiting.extend(batch[n_loaded + 1 :])
    return dict(counts)


def _start_loader(batch: list[Path], deadline: float) -> tuple[int, int]:
    """A process that loads files one after the other and writes a byte after each."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for path in batch:
        signal.alarm(60)  # a hang is a signal, too
        with _suppressed_all():
            load_with_libllama(path)
        os.write(writer, b".")
        if time.monotonic() > deadline:
            break
    os._exit(0)


def _suppressed_all() -> Any:
    import contextlib

    return contextlib.suppress(Exception)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=["safetensors", "bin", "gguf"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, default=10_000_000, help="cases of a target")
    arguments = parser.parse_args()
    assert models()
    is_harmless = True
    for target in arguments.targets:
        seconds = arguments.seconds / len(arguments.targets)
        counts = run_target(target, seconds, arguments.seed, arguments.jobs, arguments.limit)
        is_harmless &= not any(counts.get(name, 0) for name in HARM)
        print(json.dumps({"target": target, "seed": arguments.seed, **counts}), flush=True)
    return 0 if is_harmless else 1


if __name__ == "__main__":
    sys.exit(main())
