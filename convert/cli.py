"""`fourbit fetch`, `quantize`, `baseline`, `replica`, `inspect` and `verify`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from convert import summary as summaries
from convert.fetch import SOURCES
from convert.fetch import fetch as fetch_checkpoint
from convert.jobs import Job, jobs_in_home
from convert.mixture import MIXTURES
from convert.pipeline import Progress
from convert.quantize import Written
from convert.quantize import quantize as convert_checkpoint
from convert.remote_shard import remote_shards
from convert.replica import write_replica
from convert.shard import Shard
from convert.verify import verdict_lines, verify_file
from engine.home import checkpoint_folder
from engine.registry import model as registered

Command = Callable[..., Any]

FLOAT_TYPES = ("F16", "BF16")
PATH = click.Path(path_type=Path)


SOURCE = click.option(
    "--source", type=click.Choice(SOURCES), help="The hub to use; ModelScope, then the Hugging Face hub by default."
)


def _conversion_options(command: Command) -> Command:
    for option in (
        SOURCE,
        click.option(
            "--pad-ff/--no-pad-ff", default=None, help="Fill the feed-forward width up to whole blocks; per model."
        ),
        click.option("--stream", is_flag=True, help="Convert straight from the hub: no disk for the checkpoint."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object a file and nothing else."),
        click.option("--force", is_flag=True, help="Replace a file that is already there."),
        click.option("--threads", type=click.IntRange(1, 256), help="Worker threads; one a usable core by default."),
        click.option("--out", type=PATH, help="The file to write; by default its place in the models folder."),
        click.option("--checkpoint", type=PATH, help="A checkpoint folder in an official layout."),
        click.argument("models", nargs=-1, metavar="[MODEL]..."),
    ):
        command = option(command)
    return command


@click.command()
@click.option("--type", "ftype", type=click.Choice(list(MIXTURES)), default="Q4_K_M", show_default=True)
@_conversion_options
def quantize(ftype: str, **options: Any) -> None:
    """Turn checkpoints into quantized GGUF files, in one pass.

    MODEL is a key of models.toml; without one, those at hand or, when none is, all. A checkpoint
    that is not in the models folder is fetched first, or with --stream read from the hub as it is
    converted. A run that was
    interrupted goes on where it stood.
    """
    _convert(ftype, **options)


@click.command()
@click.option("--type", "ftype", type=click.Choice(FLOAT_TYPES), default="F16", show_default=True)
@_conversion_options
def baseline(ftype: str, **options: Any) -> None:
    """Turn checkpoints into unquantized GGUF files: the fp16 side of a comparison."""
    _convert(ftype, **options)


def _convert(
    ftype: str,
    models: Sequence[str],
    checkpoint: Path | None,
    out: Path | None,
    threads: int | None,
    force: bool,
    as_json: bool,
    stream: bool,
    source: str | None,
    pad_ff: bool | None,
) -> None:
    if models and checkpoint:
        raise click.UsageError("give either MODEL or --checkpoint: the family is read from the folder's config.json")
    jobs = [Job(checkpoint, out)] if checkpoint else jobs_in_home(models, ftype, force or out is not None)
    if out is not None and len(jobs) != 1:
        raise click.UsageError(f"--out names one file, but there are {len(jobs)} checkpoints: name one MODEL")
    for job in jobs:
        if job.is_done:
            _say(f"{job.out} is already there; --force makes it again", as_json, {"path": str(job.out), "done": True})
            continue
        remote = _bring(job, source, stream, as_json) if job.missing else None
        with _progress_bar(as_json) as on_progress:
            written = convert_checkpoint(
                job.folder,
                out or job.out,
                ftype,
                remote=remote,
                pad_ff=pad_ff,
                n_threads=threads,
                overwrite=force,
                on_progress=on_progress,
            )
        _report(written, as_json)


def _bring(job: Job, source: str | None, stream: bool, is_quiet: bool) -> dict[str, Shard]:
    """The checkpoint of a job into its folder; with stream, only its small files: the rest as remote shards."""
    assert job.missing is not None
    sources = (source,) if source else SOURCES
    click.echo(
        f"{job.missing.title}: {'converting from' if stream else 'fetching from'} {' or '.join(sources)}", err=True
    )
    with _progress_bar(is_quiet) as on_progress:
        if stream:
            return remote_shards(job.missing, job.folder, sources, on_progress=on_progress)
        fetch_checkpoint(job.missing, job.folder, sources, on_progress=on_progress)
    return {}


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@SOURCE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a model and nothing else.")
def fetch(models: Sequence[str], source: str | None, as_json: bool) -> None:
    """Download checkpoints: only the files that conversion needs, resumed where a run ended, every byte verified."""
    for key in models:
        spec, start = registered(key), time.perf_counter()
        folder = checkpoint_folder(spec)
        with _progress_bar(as_json) as on_progress:
            records, _ = fetch_checkpoint(spec, folder, (source,) if source else SOURCES, on_progress=on_progress)
        n_bytes, seconds_s = sum(record.n_bytes for record in records.values()), time.perf_counter() - start
        files = [dataclasses.asdict(record) for record in records.values()]
        text = f"{folder}: {spec.title}, {len(files)} files, {n_bytes / 1e9:.3f} GB, verified"
        _say(text, as_json, {"model": key, "folder": str(folder), "seconds_s": seconds_s, "files": files})


@click.command()
@click.argument("file", type=PATH)
@click.option("--checkpoint", type=PATH, help="Compare the weights with this checkpoint, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(file: Path, checkpoint: Path | None, as_json: bool) -> None:
    """Check a GGUF FILE: structure, every block, hashes from its sidecar; the error against a checkpoint."""
    with _progress_bar(as_json) as on_progress:
        found = verify_file(file, checkpoint, on_progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found) | {"path": str(file)}, ensure_ascii=False))
    else:
        click.echo("\n".join(verdict_lines(found)))


@click.command()
@click.argument("key", metavar="MODEL")
@click.option("--type", "ftype", type=click.Choice(list(MIXTURES)), default="Q4_K_M", show_default=True)
@click.option("--out", type=PATH, help="The file to write; by default under replicas/ in the models folder.")
@click.option("--pad-ff/--no-pad-ff", default=None, help="As quantize would.")
@click.option("--layers", "n_layer", type=click.IntRange(1, 512), help="Fewer layers than the model has.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def replica(key: str, ftype: str, out: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Write a file of MODEL's exact shapes and types with made-up weights, to measure before downloading."""
    with _progress_bar(as_json) as on_progress:
        written = write_replica(registered(key), ftype, out, overwrite=force, on_progress=on_progress, **options)
    _report(written, as_json)


@click.command()
@click.argument("file", type=PATH)
@click.option("--tensors", is_flag=True, help="List every tensor, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show the header, shapes, mixture and sizes of a GGUF FILE."""
    found = summaries.summarize(file)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found) | {"path": str(file)}, ensure_ascii=False))
        return
    click.echo("\n".join(summaries.summary_lines(found) + (summaries.tensor_lines(file) if tensors else [])))


def _report(written: Written, as_json: bool) -> None:
    figures = dataclasses.asdict(written) | {"path": str(written.path)}
    rate = written.n_bytes / 1e6 / max(written.seconds_s, 1e-9)
    text = f"{written.path}: {written.model} {written.ftype}, {written.n_tensors} tensors, "
    text += f"{written.n_resumed} of them from an earlier run, " if written.n_resumed else ""
    _say(text + f"{written.n_bytes / 1e9:.3f} GB in {written.seconds_s:.1f} s ({rate:.0f} MB/s)", as_json, figures)


def _say(text: str, as_json: bool, figures: dict[str, Any]) -> None:
    click.echo(json.dumps(figures) if as_json else text)


@contextmanager
def _progress_bar(is_quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with bytes of source done, MB/s, time left and the tensor; none where no one watches."""
    with tqdm(unit="B", unit_scale=True, disable=True if is_quiet else None, leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total_bytes
            bar.set_postfix_str(progress.tensor, refresh=False)
            bar.update(progress.done_bytes - bar.n)

        yield show
