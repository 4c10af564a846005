"""What our decode loop costs over a bare one: the same tokens' work, interleaved in one process.

    ours   the engine's own loop: decode, sampler chain in C, stop check, the id's bytes, incremental text
    bare   llama_decode on a batch made once, argmax of the logits

`python -m bench.overhead [FILE]` prints both medians and their ratio as one JSON line; without a
file, on a replica whose token takes 5 ms or more. Both loops take turns token by token, so noise
of the machine falls on both alike; each has a context of its own, filled alike.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from convert.replica import write_replica
from engine import native
from engine.engine import Engine
from engine.errors import FourbitError, NativeError
from engine.host import usable_cores
from engine.registry import Sampling, model

REPLICA, N_LAYER = "chatglm3-6b", 2
N_CTX, N_WARMUP, N_TOKENS, MAX_TOKENS = 512, 8, 200, 256
PROMPT = [{"role": "user", "content": "a" * 16}]
GREEDY = Sampling(temperature=0.0, top_p=1.0)
SHORTEST_TOKEN_MS = 5.0


def measure(path: Path, n_tokens: int = N_TOKENS) -> dict[str, float]:
    """Median ms of a token in each loop, and the median of the pairwise ratios ours / bare."""
    with Engine.open(path, n_ctx=N_CTX) as ours, native.Model(path) as bare_model:
        context = native.Context(bare_model, N_CTX, n_threads=usable_cores())
        steps = _our_steps(ours), _bare_steps(context, ours.prompt_ids(PROMPT), ours.vocabulary.stop_ids)
        for _ in range(N_WARMUP):
            for step in steps:
                next(step)
        pairs = [_timed_pair(steps, is_swapped=bool(i % 2)) for i in range(n_tokens)]
        context.close()
    our_ms, bare_ms = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    ratio = statistics.median(our / bare for our, bare in pairs)
    return {"ours_ms": our_ms, "bare_ms": bare_ms, "ratio": ratio, "n_tokens": float(n_tokens)}


def _timed_pair(steps: Sequence[Iterator[object]], is_swapped: bool) -> tuple[float, float]:
    """Seconds of one token of each loop; who goes first alternates."""
    times = [0.0, 0.0]
    for which in (1, 0) if is_swapped else (0, 1):
        start = time.perf_counter()
        next(steps[which])
        times[which] = time.perf_counter() - start
    return times[0], times[1]


def _our_steps(engine: Engine) -> Iterator[object]:
    """Greedy replies of the engine, one after another."""
    while True:
        yield from engine.chat(PROMPT, sampling=GREEDY, max_tokens=MAX_TOKENS)


def _bare_steps(context: native.Context, prompt_ids: list[int], stop_ids: frozenset[int]) -> Iterator[int]:
    """The same ids by llama_decode and argmax, and nothing else: time depends on the ids, too."""
    decode = _bare_decode(context)
    while True:
        context.truncate(0)
        context.decode(prompt_ids, 0)
        for position in range(len(prompt_ids), len(prompt_ids) + MAX_TOKENS):
            id = int(context.logits().argmax())
            yield id
            if id in stop_ids:
                break
            decode(id, position)


def _bare_decode(context: native.Context) -> Callable[[int, int], None]:
    """A call of llama_decode on one token, with nothing of ours around it."""
    library, batch = native._lib, context._batch
    pointer = context.pointer

    def decode(id: int, position: int) -> None:
        struct = batch.struct
        struct.n_tokens, struct.token[0], struct.pos[0], struct.logits[0] = 1, id, position, 1
        if status := library.llama_decode(pointer, struct):
            raise NativeError(f"the bare loop failed at {position} with status {status}")

    return decode


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON; exit 1 with one line where it cannot be measured."""
    try:
        with _file(arguments) as path:
            figures = measure(path)
    except FourbitError as error:
        sys.exit(f"fourbit: {error}")
    if figures["bare_ms"] < SHORTEST_TOKEN_MS:
        sys.exit(f"a token takes {figures['bare_ms']:.1f} ms here; a ratio needs {SHORTEST_TOKEN_MS:.0f} or more")
    print(json.dumps(figures))


@contextlib.contextmanager
def _file(arguments: Sequence[str]) -> Iterator[Path]:
    if arguments:
        yield Path(arguments[0])
        return
    with tempfile.TemporaryDirectory(prefix="fourbit-overhead-") as folder:
        yield write_replica(model(REPLICA), "Q4_K_M", Path(folder, "replica.gguf"), n_layer=N_LAYER).path


if __name__ == "__main__":
    main(sys.argv[1:])
