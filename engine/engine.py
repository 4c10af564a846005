"""The engine: a model ready to answer, and its decode loop."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from engine import fit, native, states
from engine.cache import KVCache, common_prefix
from engine.chat import Message, prompt_ids, system_ids
from engine.errors import ContextError, MessageError, NativeError, StateError
from engine.gguf_check import check_file
from engine.gguf_header import Header, read_header
from engine.home import find_model_file
from engine.host import memory
from engine.lookup import MAX_DRAFT, Drafter, Gate
from engine.overflow import Prompt, fitted_prompt
from engine.pages import release_repacked
from engine.registry import Model, Sampling
from engine.settings import Settings, settings_for
from engine.vocab import Vocabulary, spec_of

NO_ID = -1  # of a record that brings none
DEFAULT_N_CTX = 2048  # a KV cache of at most 1.1 GB: what a machine of 8 GB has beside a model of 5


@dataclass(frozen=True, slots=True)
class Reply:
    """One step of a reply: `text` is what is new; finish is None but in the last record.

    finish: "stop" (the model ended), "length" (max_tokens), "context" (it is full), "cancelled".
    n_prompt = n_reused + n_evaluated; n_dropped: whole turns left out of the prompt.
    """

    id: int
    text: str
    finish: str | None
    n_prompt: int
    n_reused: int
    n_dropped: int
    n_reply: int
    ttft_ms: float
    decode_ms: float  # mean of the ids after the first

    @property
    def n_evaluated(self) -> int:
        return self.n_prompt - self.n_reused


class Draws(Protocol):
    """What draws ids from the logits of a row of the last batch."""

    def sample(self, row: int = -1) -> int: ...


class Engine:
    """A GGUF file, open, with a context; one reply at a time."""

    def __init__(
        self, header: Header, spec: Model, model: native.Model, context: native.Context, settings: Settings
    ) -> None:
        self.header, self.spec, self.settings = header, spec, settings
        self._model, self._context = model, context
        self.cache = KVCache(context)
        self.vocabulary = Vocabulary(model, header, spec)
        self._turn = 0
        self._is_cancelled = False
        self._gate = Gate()  # what a batch costs here is the same for every reply

    @classmethod
    def open(
        cls,
        path_or_model: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_batch: int | None = None,
        repack: bool | None = None,
        flash_attention: str | None = None,
        kv_qtype: str | None = None,
    ) -> Engine:
        """Open a file, or the quantized file of a model of models.toml.

        n_ctx: tokens of context, DEFAULT_N_CTX unless the model has fewer; beyond what it was trained
        for it warns. Everything else: as `fourbit tune` measured it here, else the defaults of
        engine/settings.py; n_threads counts for batches, too, unless they have their own.
        Raises NotFound, GGUFError, DoesNotFit, ContextError or NativeError.
        """
        header = read_header(find_model_file(path_or_model))
        spec = spec_of(header)
        n_ctx = _checked_n_ctx(header, n_ctx)
        settings = settings_for(header).changed(
            n_threads=n_threads,
            n_threads_batch=n_threads_batch or n_threads,
            n_batch=n_batch,
            repack=repack,
            flash_attention=flash_attention,
            kv_qtype=kv_qtype,
        )
        fit.check(header, n_ctx, memory(), settings)
        check_file(header, spec)
        model = native.Model(header.path, repack=settings.repack)
        try:
            context = native.Context(
                model,
                n_ctx,
                n_threads=settings.n_threads,
                n_threads_batch=settings.n_threads_batch,
                n_batch=settings.n_batch,
                kv_qtype=settings.kv_qtype,
                flash_attention=settings.flash_attention,
            )
            if settings.repack:
                release_repacked(header)
            return cls(header, spec, model, context, settings)
        except BaseException:
            model.close()
            raise

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        overflow: str = "error",
        lookup: bool = False,
    ) -> Iterator[Reply]:
        """Answer messages of {role, content}; the texts of the records together are the reply, whole.

        What the cache holds of the prompt already is not evaluated again. sampling: the model's own
        from models.toml by default; seed: drawn by default; overflow: see engine/overflow.py; lookup:
        drafts from the text itself (engine/lookup.py), the same reply sooner where text is repeated.
        MessageError or ContextError come at once, before the first record is asked for.
        """
        if max_tokens is not None and max_tokens < 1:
            raise MessageError(f"max_tokens is {max_tokens}; at least 1 is needed")
        prompt = fitted_prompt(self.spec.chat, messages, self.vocabulary, self.n_ctx, overflow, max_tokens)
        self._turn += 1
        self._is_cancelled = False
        chosen = self.spec.sampling if sampling is None else sampling
        seed = secrets.randbits(32) if seed is None else seed
        return self._reply(prompt, max_tokens, chosen, seed, lookup)

    def cancel(self) -> None:
        """End the reply that is being made, from any thread: within one batch of the prompt or one token."""
        self._is_cancelled = True

    def ask(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> str:
        """The reply to one question, as text."""
        records = self.chat([{"role": "user", "content": text}], max_tokens=max_tokens, sampling=sampling, seed=seed)
        return self.shown("".join(record.text for record in records))

    def cache_prefix(self, system: str | None = None) -> int:
        """Have the state of a system prompt on disk; the number of its ids that need no evaluation from now on.

        Taken up from the states folder where it is there and sound, else evaluated once and saved.
        0 where a model's prompt begins with nothing (no system message, none by default).
        StateError where it cannot be written.
        """
        ids = system_ids(self.spec.chat, system, self.vocabulary)
        if not ids:
            return 0
        if common_prefix(self.cache.ids, ids) == len(ids):
            return len(ids)
        path = states.states_folder() / states.state_name(self.origin(), ids)
        try:
            state = states.load(path, self.origin())
            self.cache.load(state.ids, state.data)
        except (StateError, NativeError):
            self.cache.evaluate(ids)
            states.save(path, self.origin(), states.State(ids, self.cache.save()))
        return len(ids)

    def origin(self) -> states.Origin:
        """What a saved state of this engine belongs to; hashes the model file once."""
        sha256, settings = states.model_sha256(self.header.path), self.settings
        return states.Origin(
            sha256, native.PINNED, settings.kv_qtype, settings.flash_attention, self.vocabulary.n_vocab
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that chat() would evaluate."""
        return prompt_ids(self.spec.chat, messages, self.vocabulary)

    def shown(self, reply: str) -> str:
        """A whole reply as the model's authors show it and keep it in the history."""
        return reply.strip() if self.spec.chat.strip_reply else reply

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    def _reply(
        self, prompt: Prompt, max_tokens: int | None, sampling: Sampling, seed: int, lookup: bool
    ) -> Iterator[Reply]:
        tally = _Tally(prompt, time.perf_counter())
        tally.n_reused = self.cache.evaluate(prompt.ids, lambda: not self._is_cancelled)
        if self._is_cancelled:
            yield tally.record(NO_ID, "", "cancelled")
            return
        stream = self.vocabulary.stream()
        with native.Sampler(self._context, sampling, seed) as sampler:
            sampler.accept(prompt.ids)
            for id, is_last in self.steps(sampler, prompt.ids, lookup):
                is_stop = id in self.vocabulary.stop_ids
                tally.count(is_stop)
                finish = self._finish(is_stop, is_last, tally.n_reply == max_tokens)
                text = stream.flush() if is_stop else stream.add(id) + (stream.flush() if finish else "")
                yield tally.record(id, text, finish)
                if finish:
                    return

    def _finish(self, is_stop: bool, is_full: bool, is_long: bool) -> str | None:
        for is_so, finish in (
            (is_stop, "stop"),
            (is_long, "length"),
            (self._is_cancelled, "cancelled"),
            (is_full, "context"),
        ):
            if is_so:
                return finish
        return None

    def steps(self, sampler: Draws, prompt_ids: Sequence[int], lookup: bool) -> Iterator[tuple[int, bool]]:
        """Ids drawn after a prompt that is in the cache; True with the last that the context has room for."""
        return self._drafted_steps(sampler, prompt_ids, self._turn) if lookup else self._steps(sampler, self._turn)

    def _steps(self, sampler: Draws, turn: int) -> Iterator[tuple[int, bool]]:
        """Sampled ids, each evaluated before the next is drawn; True with the last that the context has room for."""
        while True:
            id = sampler.sample()
            yield id, len(self.cache.ids) == self.n_ctx
            if turn != self._turn:
                raise MessageError("another chat was begun on this engine: one reply at a time")
            self.cache.append([id])

    def _drafted_steps(self, sampler: Draws, prompt_ids: Sequence[int], turn: int) -> Iterator[tuple[int, bool]]:
        """The same ids as _steps(), several to an evaluation where the text repeats itself.

        The cache holds drafted ids only while they are looked at: whatever ends the reply, it ends
        with the ids that were taken.
        """
        drafter = Drafter(prompt_ids)
        self._gate.begin()
        id = sampler.sample()
        while True:
            n_left = self.n_ctx - len(self.cache.ids)
            yield id, n_left == 0
            if turn != self._turn:
                raise MessageError("another chat was begun on this engine: one reply at a time")
            drafter.add(id)
            guess = drafter.guess(min(MAX_DRAFT, n_left - 1, self.settings.n_batch - 1))
            draft = guess.ids[: self._gate.length(guess)]
            n_before, start = len(self.cache.ids), time.perf_counter()
            self.cache.append([id, *draft], logits="all" if draft else "last")
            n_right = 0
            try:
                id = sampler.sample(0 if draft else -1)
                seconds_s = time.perf_counter() - start  # evaluating and drawing; what the caller does is not counted
                while n_right < len(draft) and id == draft[n_right]:
                    n_right += 1
                    yield id, False
                    start = time.perf_counter()
                    drafter.add(id)
                    id = sampler.sample(n_right)
                    seconds_s += time.perf_counter() - start
            finally:
                self.cache.truncate(n_before + 1 + n_right)
            self._gate.measured(len(draft), seconds_s, n_right)
            self._gate.judged(guess, [*draft[:n_right], id])

    def close(self) -> None:
        """Free the context and the model."""
        self._turn += 1
        self._context.close()
        self._model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.close()


class _Tally:
    """What the records of one reply count."""

    def __init__(self, prompt: Prompt, start_s: float) -> None:
        self._prompt, self._start_s = prompt, start_s
        self.n_reused = self.n_reply = 0
        self._first_s = self._last_s = 0.0
        self._n_ids = 0

    def count(self, is_stop: bool) -> None:
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self._n_ids += 1
        self.n_reply += not is_stop

    def record(self, id: int, text: str, finish: str | None) -> Reply:
        ttft_ms = max(0.0, self._first_s - self._start_s) * 1e3
        decode_ms = (self._last_s - self._first_s) * 1e3 / max(1, self._n_ids - 1)
        n_prompt, n_dropped = len(self._prompt.ids), self._prompt.n_dropped
        return Reply(id, text, finish, n_prompt, self.n_reused, n_dropped, self.n_reply, ttft_ms, decode_ms)


def _checked_n_ctx(header: Header, n_ctx: int | None) -> int:
    trained = fit.sizes_of(header).n_ctx_train
    if n_ctx is None:
        return min(DEFAULT_N_CTX, trained)
    if n_ctx < 1:
        raise ContextError(f"a context of {n_ctx} tokens; at least 1 is needed")
    if n_ctx > trained:
        warnings.warn(
            f"a context of {n_ctx} tokens, but the model was trained for {trained}: beyond them replies get worse",
            stacklevel=3,
        )
    return n_ctx
