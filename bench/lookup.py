"""What drafts from repeated text gain, on a model with real weights: `python -m bench.lookup [FILE]`.

Two sets of questions: those whose answers quote or edit what stands in the question, and free ones.
Each question is answered by the plain loop and with lookup in turns, greedily, with the same ids; the
time of decoding counts. ceiling: the gain if every draft were free to know, from the measured cost of
batches and the share of ids that could have been copied. Prints one JSON line.

What batches cost differs from model to model, so the same replies are also replayed on a full-size
replica: what a model of 7B with this text takes, every batch evaluated.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.replica import write_replica
from engine import Engine
from engine.errors import FourbitError
from engine.home import find_model_file
from engine.lookup import MAX_DRAFT, Drafter
from engine.registry import Sampling, model

REPLICA = "deepseek-llm-7b-chat"
GREEDY = Sampling(temperature=0.0, top_p=1.0)
MAX_TOKENS, ROUNDS = 160, 3
STORY = (
    "The harbour of Lindau was built in 1856 and has two towers. The old tower stood on the island in the "
    "thirteenth century. The new tower carries a lamp that is lit when ships are announced. Between them stands "
    "a lion of stone, six metres high, who looks across the lake to the mountains. In winter the ferries stop."
)
CODE = """def total(prices, rate):
    result = 0
    for price in prices:
        result = result + price * (1 + rate)
    return result


def average(prices, rate):
    if not prices:
        return 0
    return total(prices, rate) / len(prices)
"""
COPYING = (
    f"Repeat the following text word for word.\n\n{STORY}",
    f"Quote every sentence of this text, one after the other, each in quotation marks.\n\n{STORY}",
    f"Rewrite this code with the name `prices` replaced by `amounts`. Print all of it.\n\n```python\n{CODE}```",
    f"Add a docstring to each function and print the whole file again.\n\n```python\n{CODE}```",
    f"Correct the spelling of this text and print it whole: {STORY.replace('tower', 'towr')}",
    f"Here is a text: {STORY}\n\nWhat does the text say about the towers? Answer by quoting the text.",
)
FREE = (
    "Write a short poem about autumn.",
    "Explain why the sky is blue.",
    "What should I cook tonight?",
    "Tell me about the history of printing.",
)
SETS = {"copying": COPYING, "free": FREE}


@dataclass(frozen=True, slots=True)
class Reply:
    """What the small model said."""

    set: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]


def measure(path: Path) -> tuple[dict[str, object], list[Reply]]:
    """Gain of each question, and the median of each set; the replies."""
    replies: list[Reply] = []
    with Engine.open(path, n_ctx=1024) as engine:
        costs = batch_costs(engine)
        sets = {}
        for name, questions in SETS.items():
            rows = [compare(engine, question, costs, name, replies) for question in questions]
            gains, ceilings = [row["gain"] for row in rows], [row["ceiling"] for row in rows]
            sets[name] = {
                "gain": round(statistics.median(gains), 3),
                "worst": round(min(gains), 3),
                "ceiling": round(statistics.median(ceilings), 3),
                "rows": rows,
            }
    return {"model": path.name, "batch_costs": [round(cost, 2) for cost in costs], **sets}, replies


def compare(engine: Engine, question: str, costs: Sequence[float], name: str, replies: list[Reply]) -> dict[str, float]:
    """Plain against lookup on one question, in turns; every round begins with the prompt anew."""
    times: dict[bool, list[float]] = {False: [], True: []}
    ids: dict[bool, list[int]] = {}
    for n in range(ROUNDS):
        for lookup in (False, True) if n % 2 else (True, False):
            seconds_s, ids[lookup] = decode(engine, question, lookup)
            times[lookup].append(seconds_s / len(ids[lookup]))
    plain, drafted = statistics.median(times[False]), statistics.median(times[True])
    prompt = engine.prompt_ids([{"role": "user", "content": question}])
    replies.append(Reply(name, prompt, ids[False]))
    same = next((i for i, pair in enumerate(zip(*ids.values(), strict=False)) if pair[0] != pair[1]), len(ids[True]))
    return {
        "gain": round(plain / drafted, 3),
        "ceiling": round(ceiling(prompt, ids[False], costs), 3),
        "n_ids": len(ids[False]),
        "n_same": same,
    }


class Replay:
    """Stands in for a sampler: draws the ids of a reply that was made before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = iter(ids)

    def sample(self, row: int = -1) -> int:
        """The next id, whatever the logits of this row are."""
        return next(self._ids)


def replayed(replies: Sequence[Reply]) -> dict[str, object]:
    """The gain of each set on a full-size replica, each reply once plain and once with lookup."""
    with tempfile.TemporaryDirectory(prefix="fourbit-lookup-") as folder:
        path = write_replica(model(REPLICA), "Q4_K_M", Path(folder, "replica.gguf")).path
        with Engine.open(path, n_ctx=1024) as engine:
            costs = batch_costs(engine)
            rows = [replay_row(engine, reply, costs, n) for n, reply in enumerate(replies)]
    gains = {
        name: [row["gain"] for row, reply in zip(rows, replies, strict=True) if reply.set == name] for name in SETS
    }
    return {
        "replica": REPLICA,
        "batch_costs": [round(cost, 2) for cost in costs],
        "gain": {name: round(statistics.median(found), 3) for name, found in gains.items()},
        "worst": {name: min(found) for name, found in gains.items()},
        "rows": rows,
    }


def replay_row(engine: Engine, reply: Reply, costs: Sequence[float], n: int) -> dict[str, float]:
    """One reply both ways; which comes first changes from reply to reply."""
    times = {lookup: replay(engine, reply, lookup) for lookup in ((False, True) if n % 2 else (True, False))}
    return {
        "gain": round(times[False] / times[True], 3),
        "ceiling": round(ceiling(reply.prompt_ids, reply.ids, costs), 3),
        "n_ids": len(reply.ids),
    }


def replay(engine: Engine, reply: Reply, lookup: bool) -> float:
    """Seconds from the first id to the last."""
    engine.cache.evaluate(reply.prompt_ids)
    start = 0.0
    for n, _ in enumerate(engine.steps(Replay([*reply.ids, 0]), reply.prompt_ids, lookup), start=1):
        start = start or time.perf_counter()
        if n == len(reply.ids):
            break
    return time.perf_counter() - start


def decode(engine: Engine, question: str, lookup: bool) -> tuple[float, list[int]]:
    """Seconds from the first id of a reply to its last, and the ids."""
    engine.cache.truncate(0)
    ids, start = [], 0.0
    messages = [{"role": "user", "content": question}]
    for record in engine.chat(messages, sampling=GREEDY, max_tokens=MAX_TOKENS, lookup=lookup):
        start = start or time.perf_counter()
        ids.append(record.id)
    return time.perf_counter() - start, ids


def batch_costs(engine: Engine) -> list[float]:
    """Median cost of a batch of 1 to MAX_DRAFT + 1 ids, in single ones."""
    engine.cache.evaluate(list(range(1000, 1200)))
    times: list[list[float]] = [[] for _ in range(MAX_DRAFT + 1)]
    for _ in range(9):
        for n in range(MAX_DRAFT + 1):
            start = time.perf_counter()
            engine.cache.append(list(range(2000, 2001 + n)), logits="all")
            times[n].append(time.perf_counter() - start)
            engine.cache.truncate(200)
    medians = [statistics.median(row) for row in times]
    return [value / medians[0] for value in medians]


def ceiling(prompt: Sequence[int], ids: Sequence[int], costs: Sequence[float]) -> float:
    """The gain of this drafter if it always drafted exactly as far as it is right."""
    drafter, position, cost = Drafter(prompt), 0, 0.0
    while position < len(ids):
        drafter.add(ids[position])
        draft, rest = drafter.guess(MAX_DRAFT).ids, ids[position + 1 :]
        n_right = next((i for i, pair in enumerate(zip(draft, rest, strict=False)) if pair[0] != pair[1]), None)
        n_right = min(len(draft), len(rest)) if n_right is None else n_right
        best = max(range(n_right + 1), key=lambda n: (n + 1) / costs[n])
        for id in ids[position + 1 : position + 1 + best]:
            drafter.add(id)
        position += 1 + best
        cost += costs[best]
    return len(ids) / cost


def main(arguments: Sequence[str]) -> None:
    """Print the figures as JSON; exit 1 with one line where it cannot be measured."""
    try:
        path = Path(arguments[0]) if arguments else find_model_file("smollm2-135m")
        found, replies = measure(path)
        print(json.dumps(found | {"replayed": replayed(replies)}))
    except FourbitError as error:
        sys.exit(f"fourbit: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
