"""The `fourbit` command: loads verbs when called, turns errors into one line; `models`, `ask`, `chat`, `tokens`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from engine.errors import ContextError, FourbitError, MessageError
from engine.home import checkpoint_folder, find_model_file, home, quantized_files
from engine.registry import Sampling, model, models
from engine.settings import KV_QTYPES

if TYPE_CHECKING:
    from engine.engine import Engine, Reply
    from engine.session import Session

VERBS = "fourbit.verbs"  # the group of entry points in pyproject.toml
DEMO = "smollm2-135m"  # what `fourbit chat` talks to when nothing else was named: real, small, and comes with pip
CHAT_HELP = "Ctrl-C stops a reply, /new starts anew, /again asks again, Ctrl-D ends"
OVERFLOW_POLICIES = ("error", "drop-oldest-turns")  # engine/overflow.py, which loads llama.cpp
Message = dict[str, str]


class Verbs(click.Group):
    """Verbs by entry point: `fourbit models` imports neither llama.cpp nor the converter."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [point.name for point in importlib.metadata.entry_points(group=VERBS)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        for point in importlib.metadata.entry_points(group=VERBS, name=name):
            command: click.Command = point.load()
            return command
        return None


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fourbit")
@click.option("--debug", is_flag=True, help="Show tracebacks; may stand after the verb, too.")
def fourbit(debug: bool) -> None:
    """A 7B chat model on a laptop without a GPU: convert, chat, measure."""


def main() -> None:
    """Run the command line: exit 1 with one sentence for our errors, 2 for usage, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, _exit_on)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        code = fourbit.main(arguments, prog_name="fourbit", standalone_mode=False)
    except FourbitError as error:
        _fail(str(error), error)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(141)
    except Exception as error:
        _fail(f"a fault in fourbit ({type(error).__name__}: {error}); --debug shows where", error)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any) -> None:
    click.echo(f"fourbit: warning: {message}", err=True)


def _fail(sentence: str, error: Exception) -> None:
    if "--debug" in sys.argv:
        raise error
    click.echo(f"fourbit: {sentence}", err=True)
    sys.exit(1)


def _exit_on(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does: temporary files go."""
    sys.exit(128 + number)


@click.command("models")
@click.option("--folder", metavar="MODEL", help="Print only the folder where MODEL's checkpoint is looked for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def models_verb(folder: str | None, as_json: bool) -> None:
    """List the models, and which of them are downloaded and quantized."""
    if folder:
        click.echo(checkpoint_folder(model(folder)))
        return
    rows = [_model_row(key) for key in models()]
    if as_json:
        click.echo(json.dumps({"home": str(home()), "models": rows}, ensure_ascii=False))
        return
    click.echo(f"models folder (FOURBIT_HOME): {home()}\n")
    for row in rows:
        click.echo(f"{row['key']:22} {row['title']:22} checkpoint: {row['checkpoint'] or 'none'}")
        for file in row["files"]:
            click.echo(f"{'':22} {Path(file['path']).name}, {file['bytes'] / 1e9:.2f} GB")


def _model_row(key: str) -> dict[str, Any]:
    spec = model(key)
    folder = checkpoint_folder(spec)
    if spec.package:
        return {"key": key, "title": spec.title, "checkpoint": f"ready-made, package {spec.package.name}", "files": []}
    return {
        "key": key,
        "title": spec.title,
        "checkpoint": str(folder) if (folder / "config.json").is_file() else None,
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in quantized_files(spec)],
    }


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Draw the same reply again."),
        click.option("--temperature", type=click.FloatRange(0, 10), help="0 takes the likeliest id each time."),
        click.option("--max-tokens", type=click.IntRange(1), help="End a reply after so many tokens."),
        click.option("--lookup/--no-lookup", default=False, help="Draft from repeated text: the same reply, sooner."),
        click.option("--cache-prefix", is_flag=True, help="Keep the system prompt's state on disk for the next start."),
        click.option("--kv", "kv_qtype", type=click.Choice(KV_QTYPES), help="Type of the KV cache; Q8_0 takes half."),
        click.option("--threads", "n_threads", type=click.IntRange(1, 512), help="As tuned, or one a usable core."),
        click.option("--ctx", "n_ctx", type=click.IntRange(1), help="Tokens of context; 2048 by default."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("target", metavar="MODEL|FILE")
@click.argument("text")
@click.option("--system", help="A system prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@_engine_options
def ask(target: str, text: str, system: str | None, as_json: bool, **options: Any) -> None:
    """Ask one question; the reply streams to stdout."""
    with _opened(target, system, options) as (engine, arguments):
        whole, last = _stream(engine, engine.chat(_messages(system, text), **arguments), is_shown=not as_json)
    if as_json:
        figures = {name: value for name, value in dataclasses.asdict(last).items() if name not in ("id", "text")}
        click.echo(json.dumps({"reply": whole, **figures}, ensure_ascii=False))


@click.command()
@click.argument("target", metavar="MODEL|FILE", default=DEMO)
@click.option("--system", help="A system prompt.")
@click.option("--resume", is_flag=True, help="Go on with the last chat of this model, and keep this one on exit.")
@click.option(
    "--overflow",
    type=click.Choice(OVERFLOW_POLICIES),
    default="drop-oldest-turns",
    show_default=True,
    help="What happens when the context is full.",
)
@_engine_options
def chat(target: str, system: str | None, resume: bool, overflow: str, **options: Any) -> None:
    """Talk, turn by turn: Ctrl-C stops a reply, /new forgets the conversation, Ctrl-D ends."""
    from engine.session import Session

    _edit_lines()
    with _opened(target, system, options) as (engine, arguments):
        session = Session(engine, system=system, overflow=overflow)
        click.echo(f"{engine.spec.title}: {CHAT_HELP}", err=True)
        if resume:
            _resume(session)
        while (line := _next_line()) is not None:
            if line == "/new":
                session.clear()
            elif line == "/again":
                _take_turn(session, session.regenerate, arguments)
            elif line:
                _take_turn(session, functools.partial(session.send, line), arguments)
        if resume:
            session.save()


def _resume(session: Session) -> None:
    n_messages = session.resume()
    if n_messages:
        click.echo(f"[going on with {n_messages} messages, {len(session.engine.cache.ids)} tokens from disk]", err=True)


def _take_turn(session: Session, begin: Callable[..., Iterator[Reply]], arguments: dict[str, Any]) -> None:
    """One more turn of the conversation; nothing changes when it cannot begin."""
    try:
        reply = begin(**arguments)
    except (ContextError, MessageError) as error:
        click.echo(f"fourbit: {error} (/new starts anew)", err=True)
        return
    _, last = _stream(session.engine, reply, may_stop=True)
    if last and last.n_dropped:
        click.echo(f"[{last.n_dropped} oldest turns left out: the context has {session.engine.n_ctx} tokens]", err=True)
    if last and last.finish == "context":
        click.echo(f"[the context of {session.engine.n_ctx} tokens is full: the reply ends here]", err=True)


def _stream(
    engine: Engine, reply: Iterator[Reply], *, is_shown: bool = True, may_stop: bool = False
) -> tuple[str, Reply]:
    """Show a reply as it comes; the whole of it as it belongs into the history, and the last record.

    may_stop: Ctrl-C ends the reply, said on stderr, instead of the program.
    """
    parts: list[str] = []
    record: Reply | None = None
    try:
        for record in reply:
            new = record.text.lstrip() if engine.spec.chat.strip_reply and not "".join(parts).strip() else record.text
            parts.append(new)
            if is_shown:
                click.echo(new, nl=False)
    except KeyboardInterrupt:
        if not may_stop:
            raise
        reply.close()  # type: ignore[attr-defined]
        click.echo("\n[stopped]", err=True, nl=False)
    if is_shown:
        click.echo()
    return engine.shown("".join(parts)), record  # type: ignore[return-value]


@click.command()
@click.argument("target", metavar="MODEL|FILE")
@click.option("--messages", "file", type=click.File(encoding="utf-8"), required=True, help="JSON; - is stdin.")
def tokens(target: str, file: Any) -> None:
    """Print prompt ids as JSON for a list of {role, content}, or for a list of such lists."""
    from engine.chat import prompt_ids
    from engine.vocab import open_vocabulary

    try:
        data = json.load(file)
    except ValueError as error:
        raise MessageError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(data, list):
        raise MessageError(f"{file.name} holds a {type(data).__name__}, not a list of messages")
    spec, vocabulary = open_vocabulary(find_model_file(target))
    is_nested = bool(data) and all(isinstance(item, list) for item in data)
    ids = [prompt_ids(spec.chat, item, vocabulary) for item in (data if is_nested else [data])]
    click.echo(json.dumps({"ids": ids if is_nested else ids[0]}))


@contextmanager
def _opened(target: str, system: str | None, options: dict[str, Any]) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """The engine, and the arguments that its chat() takes."""
    from engine.engine import Engine

    settings = {name: options[name] for name in ("n_ctx", "n_threads", "kv_qtype")}
    with Engine.open(target, **settings) as engine:
        if options["cache_prefix"]:
            engine.cache_prefix(system)
        sampling: Sampling = engine.spec.sampling
        if options["temperature"] is not None:
            sampling = dataclasses.replace(sampling, temperature=options["temperature"])
        yield engine, {"sampling": sampling, **{name: options[name] for name in ("max_tokens", "seed", "lookup")}}


def _messages(system: str | None, *user: str) -> list[Message]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return turns + [{"role": "user", "content": text} for text in user]


def _next_line() -> str | None:
    """One line from the user, None at the end of input; Ctrl-C drops the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            click.echo(err=True)
            return None
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D ends)", err=True)


def _edit_lines() -> None:
    """Arrow keys and history in input(), where Python has readline."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401
        except ImportError:
            return
