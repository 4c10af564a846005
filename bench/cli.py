"""`fourbit bench`: measures, prints the card, the table and one JSON line, and keeps them in files."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from bench import plan as plans
from bench import report as reports
from bench.machine import read_card
from bench.probe import read_bandwidth
from bench.subject import Pair, pair_of_model, pairs_of_files
from engine.errors import NotFound
from engine.registry import checkpoints

ROOT = Path(__file__).resolve().parents[1]


@click.command()
@click.argument("targets", nargs=-1, metavar="[MODEL|FILE]...")
@click.option("--quick", is_flag=True, help="Small replicas of two layers: the whole table in minutes.")
@click.option("--type", "qtype", help="The quantized side's type; the model's own by default (Q4_K_M).")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Where replicas are made and deleted.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where the report is kept.")
@click.option("--json", "only_json", is_flag=True, help="Print nothing but the JSON line.")
def bench(
    targets: tuple[str, ...],
    quick: bool,
    qtype: str | None,
    work: Path | None,
    out: Path | None,
    only_json: bool,
) -> None:
    """Measure each MODEL (all of them by default) or GGUF FILE, quantized and fp16 side by side.

    Where a model's file is missing, a replica is made, measured and deleted.
    """
    start = time.monotonic()
    pairs = _pairs(targets, qtype, plans.QUICK_LAYERS if quick else None)
    _say("measuring this machine")
    card = read_card()
    plan = plans.Plan(read_bytes_per_s=card.read_bytes_per_s, work=work)
    if not only_json:
        click.echo("\n".join(reports.card_lines(card)) + "\n")
    found, best = [], card.read_bytes_per_s
    for pair in pairs:
        found += plans.compare([pair], plans.quick(plan) if quick else plan, _say)
        best = max(best, read_bandwidth())  # a busy moment at the start must not pass for the machine
    found = [plans.with_bandwidth(comparison, best) for comparison in found]
    card = dataclasses.replace(card, read_bytes_per_s=best)
    report = reports.Report(_command(), card, tuple(found), time.monotonic() - start)
    kept = _keep(report, out or _results_folder())
    if not only_json:
        click.echo("\n".join(reports.table_lines(found)) + f"\n\nkept as {kept} and .md")
    click.echo(json.dumps(reports.json_object(report)))


def _pairs(targets: Sequence[str], qtype: str | None, n_layer: int | None) -> list[Pair]:
    """Keys of models.toml and files, in that order; NotFound for what is neither."""
    known = checkpoints()
    specs = [known[target] for target in targets if target in known] if targets else list(known.values())
    paths = [Path(target) for target in targets if target not in known]
    for path in paths:
        if not path.is_file():
            raise NotFound(f"{str(path)!r} is neither a file nor a model; the models are {', '.join(known)}")
    return [pair_of_model(spec, qtype or spec.qtype, n_layer) for spec in specs] + pairs_of_files(paths)


def _keep(report: reports.Report, folder: Path) -> Path:
    """Write the report's JSON and Markdown; the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.card.date.replace(':', '').replace('+', '-')}.json"
    path.write_text(json.dumps(reports.json_object(report), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(reports.markdown(report), encoding="utf-8")
    return path


def _results_folder() -> Path:
    """bench/results of the checkout that this runs from, else of the current folder."""
    return (ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()) / "bench" / "results"


def _command() -> str:
    return shlex.join(
        ["fourbit", "bench", *sys.argv[sys.argv.index("bench") + 1 :]] if "bench" in sys.argv else sys.argv
    )


def _say(text: str) -> None:
    click.echo(text, err=True)
