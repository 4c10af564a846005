"""The second turn and the second start: `python -m bench.turns [FILE]`, on a full-size replica without FILE.

first      time to first token of a prompt of some 500 ids, nothing in the cache
second     the same ids once more with one short question added, the cache holding what came before
restart    a new process' first token with a system prompt of some 500 ids: evaluated, then from disk
Prints one JSON line with the ratios.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from convert.replica import write_replica
from engine import Engine
from engine.errors import FourbitError
from engine.registry import Sampling, model

REPLICA = "deepseek-llm-7b-chat"
GREEDY = Sampling(temperature=0.0, top_p=1.0)
N_HISTORY = 500
Message = dict[str, str]


def first_token_ms(engine: Engine, messages: Sequence[Message]) -> float:
    """From the question to its first id."""
    start = time.perf_counter()
    next(iter(engine.chat(messages, sampling=GREEDY, max_tokens=1)))
    return (time.perf_counter() - start) * 1e3


def long_text(engine: Engine) -> str:
    """Text of about N_HISTORY ids for this vocabulary."""
    text = ""
    while len(engine.vocabulary.encode(text)) < N_HISTORY:
        text += "the river and the hill "
    return text


def measure(path: Path) -> dict[str, object]:
    """The two ratios."""
    with Engine.open(path, n_ctx=1024) as engine:
        engine.cache.evaluate([300, 301])  # pages are mapped and threads exist before the clock starts
        history = [{"role": "user", "content": long_text(engine)}, {"role": "assistant", "content": "yes"}]
        second = [*history, {"role": "user", "content": "and?"}]
        engine.cache.truncate(0)
        cold_ms = first_token_ms(engine, second)
        engine.cache.truncate(0)
        engine.cache.evaluate(engine.prompt_ids(history[:1]))
        warm_ms = first_token_ms(engine, second)
        n_prompt = len(engine.prompt_ids(second))
        system = long_text(engine)
    evaluated_ms, loaded_ms, n_system = restart(path, system)
    return {
        "n_prompt": n_prompt,
        "first_turn_ms": round(cold_ms),
        "second_turn_ms": round(warm_ms),
        "second_to_first": round(warm_ms / cold_ms, 3),
        "n_system": n_system,
        "restart_evaluated_ms": round(evaluated_ms),
        "restart_from_disk_ms": round(loaded_ms),
        "disk_to_evaluated": round(loaded_ms / evaluated_ms, 3),
    }


def restart(path: Path, system: str) -> tuple[float, float, int]:
    """First token after opening: the system prompt evaluated, then from disk; the loading counts."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "hi"}]
    with Engine.open(path, n_ctx=1024) as engine:
        engine.cache.evaluate([300, 301])
        engine.cache.truncate(0)
        evaluated_ms = first_token_ms(engine, messages)
        engine.cache.truncate(0)
        n_system = engine.cache_prefix(system)  # saves
    with Engine.open(path, n_ctx=1024) as engine:
        engine.cache.evaluate([300, 301])
        start = time.perf_counter()
        engine.cache_prefix(system)
        loaded_ms = (time.perf_counter() - start) * 1e3 + first_token_ms(engine, messages)
    return evaluated_ms, loaded_ms, n_system


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON; exit 1 with one line where it cannot be measured."""
    with tempfile.TemporaryDirectory(prefix="fourbit-turns-") as folder:
        os.environ["FOURBIT_HOME"] = folder
        try:
            if arguments:
                path = Path(arguments[0])
            else:
                path = write_replica(model(REPLICA), "Q4_K_M", Path(folder, "replica.gguf")).path
            print(json.dumps({"file": path.name, **measure(path)}))
        except FourbitError as error:
            sys.exit(f"fourbit: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
