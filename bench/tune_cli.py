"""`fourbit tune`."""

from __future__ import annotations

import dataclasses
import json

import click

from bench.tune import BUDGET_S, Outcome, tune
from engine.gguf_header import read_header
from engine.home import find_model_file
from engine.settings import keep


@click.command("tune")
@click.argument("target", metavar="MODEL|FILE")
@click.option("--budget", type=click.FloatRange(1, 3600), default=BUDGET_S, show_default=True, help="Seconds to take.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def tune_verb(target: str, budget: float, as_json: bool) -> None:
    """Measure the fastest settings for MODEL on this machine, and use them from now on."""
    path = find_model_file(target)
    outcome = tune(path, budget, lambda text: click.echo(text, err=True))
    kept = keep(read_header(path), outcome.settings)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(outcome) | {"kept": str(kept)}))
    else:
        click.echo("\n".join([*lines(outcome), f"kept in {kept}, used by default from now on"]))


def lines(outcome: Outcome) -> list[str]:
    """What was chosen and what it gains."""
    chosen = outcome.settings
    found = [
        f"threads: {chosen.n_threads} for decode, {chosen.n_threads_batch} for prefill; batches of {chosen.n_batch}; "
        f"flash attention {chosen.flash_attention}; repacking {'on' if chosen.repack else 'off'}",
        f"decode {outcome.tuned.decode_ms:.1f} ms a token, prefill {outcome.tuned.prefill_tokens_per_s:.1f} tokens/s, "
        f"measured in {outcome.seconds_s:.0f} s",
    ]
    if outcome.stock and outcome.stock_load_s is not None:
        stock = outcome.stock
        found.append(
            f"llama-cpp-python's defaults: {stock.decode_ms:.1f} ms, {stock.prefill_tokens_per_s:.1f} tokens/s, "
            f"{outcome.stock_load_s:.1f} s to load: "
            f"{stock.decode_ms / outcome.tuned.decode_ms:.2f} times as fast in decode, "
            f"{outcome.tuned.prefill_tokens_per_s / stock.prefill_tokens_per_s:.2f} in prefill"
        )
    if outcome.released:
        before, after = outcome.released.before_bytes / 1e9, outcome.released.after_bytes / 1e9
        found.append(f"repacked: {before:.2f} GB resident, {after:.2f} GB after the file's copies were given back")
    return found
