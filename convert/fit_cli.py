"""`fourbit fit`: what a model needs in memory, from its shapes alone, and what this machine has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from convert.plan import output_shape
from convert.replica import replica_shape, replica_slots
from engine.fit import Fit, Sizes, estimate, sizes_of
from engine.gguf_header import read_header
from engine.home import find_model_file, model_file
from engine.host import Memory, memory
from engine.registry import model, models
from engine.settings import KV_QTYPES, defaults

PROFILES_GB = (8, 16)
SYSTEM_BYTES = 2_000_000_000  # what a desktop and a browser tab leave nobody else
DEFAULT_N_CTX = 2048


@click.command("fit")
@click.argument("target", metavar="MODEL|FILE")
@click.option("--type", "ftype", default=None, help="The type to convert to; the model's own by default.")
@click.option("--ctx", "n_ctx", type=click.IntRange(1), default=DEFAULT_N_CTX, show_default=True, help="Tokens.")
@click.option("--kv", "kv_qtype", type=click.Choice(KV_QTYPES), default="F16", show_default=True, help="KV cache type.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def fit_verb(target: str, ftype: str | None, n_ctx: int, kv_qtype: str, as_json: bool) -> None:
    """Say what MODEL needs in memory, before it is downloaded, and the largest context that fits."""
    name, sizes, weight_bytes = _shapes(target, ftype)
    found = estimate(sizes, weight_bytes, n_ctx, memory(), kv_qtype=kv_qtype, n_batch=defaults().n_batch)
    profiles = [_profile(sizes, weight_bytes, gb, kv) for gb in PROFILES_GB for kv in KV_QTYPES]
    if as_json:
        figures = dataclasses.asdict(found) | {"needed_bytes": found.needed_bytes, "fits": found.fits}
        click.echo(json.dumps({"model": name, "kv_qtype": kv_qtype, **figures, "profiles": profiles}))
        return
    click.echo("\n".join([*_lines(name, found, kv_qtype), "", *map(_profile_line, profiles)]))


def _shapes(target: str, ftype: str | None) -> tuple[str, Sizes, int]:
    """A title, sizes and bytes of weights, of a file or of what would be converted."""
    path = Path(target)
    if target in models():
        spec = model(target)
        qtype = ftype or spec.qtype
        if spec.package:
            return _of_file(find_model_file(target))
        if not model_file(spec, qtype).is_file():
            shape = output_shape(spec, replica_shape(spec), qtype)
            weight_bytes = sum(slot.n_bytes for slot in replica_slots(spec, qtype))
            return f"{spec.title} {qtype} (not here yet)", Sizes.of_shape(shape), weight_bytes
        path = model_file(spec, qtype)
    return _of_file(path)


def _of_file(path: Path) -> tuple[str, Sizes, int]:
    header = read_header(path)
    return path.name, sizes_of(header), header.file_bytes - header.data_offset


def _lines(name: str, found: Fit, kv_qtype: str) -> list[str]:
    rows = [
        ("weights", found.weight_bytes),
        (f"KV cache, {found.n_ctx} tokens {kv_qtype}", found.kv_bytes),
        ("compute buffers", found.compute_bytes),
        ("program", found.base_bytes),
        ("total", found.needed_bytes),
        ("free here", found.available_bytes),
    ]
    verdict = f"fits; up to {found.largest_n_ctx} tokens do" if found.fits else found.remedy()
    return [name, *(f"  {label:32} {n_bytes / 1e9:7.2f} GB" for label, n_bytes in rows), f"  {verdict}"]


def _profile(sizes: Sizes, weight_bytes: int, gb: int, kv_qtype: str) -> dict[str, Any]:
    """The largest context on a machine of so many GB with nothing else of size running."""
    total = gb * 1_000_000_000
    there = Memory(total, total - SYSTEM_BYTES, None)
    found = estimate(sizes, weight_bytes, 1, there, kv_qtype=kv_qtype, n_batch=defaults().n_batch)
    return {"machine_gb": gb, "kv_qtype": kv_qtype, "largest_n_ctx": found.largest_n_ctx}


def _profile_line(profile: dict[str, Any]) -> str:
    largest = profile["largest_n_ctx"]
    what = f"--ctx {largest} --kv {profile['kv_qtype']}" if largest else "does not fit"
    return f"  a machine of {profile['machine_gb']:2} GB, 2 of them for the system: {what}"
