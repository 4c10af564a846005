"""The engine: a model ready to answer, and its decode loop."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engine import fit, native
from engine.chat import Message, prompt_ids
from engine.errors import ContextError, MessageError
from engine.gguf_check import check_file
from engine.gguf_header import Header, read_header
from engine.home import find_model_file
from engine.host import memory, usable_cores
from engine.registry import Model, Sampling
from engine.vocab import Vocabulary, spec_of

DEFAULT_N_CTX = 2048  # a KV cache of at most 1.1 GB: what a machine of 8 GB has beside a model of 5


@dataclass(frozen=True, slots=True)
class Reply:
    """One step of a reply: `text` is what is new; finish is None, "stop" or "length" (the last record only)."""

    id: int
    text: str
    finish: str | None
    n_prompt: int
    n_reply: int
    ttft_ms: float
    decode_ms: float  # mean of the ids after the first


class Engine:
    """A GGUF file, open, with a context; one reply at a time."""

    def __init__(self, header: Header, spec: Model, model: native.Model, context: native.Context) -> None:
        self.header, self.spec = header, spec
        self._model, self._context = model, context
        self.vocabulary = Vocabulary(model, header, spec)
        self._turn = 0

    @classmethod
    def open(
        cls,
        path_or_model: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        repack: bool = False,
        kv_qtype: str = "F16",
    ) -> Engine:
        """Open a file, or the quantized file of a model of models.toml.

        n_ctx: tokens of context, DEFAULT_N_CTX unless the model has fewer. n_threads: one a usable core by default.
        Raises NotFound, GGUFError, DoesNotFit, ContextError or NativeError.
        """
        header = read_header(find_model_file(path_or_model))
        spec = spec_of(header)
        n_ctx = _checked_n_ctx(header, n_ctx)
        fit.check(header, n_ctx, memory(), kv_qtype=kv_qtype, n_batch=native.BATCH_TOKENS)
        check_file(header, spec)
        threads = n_threads or usable_cores()
        model = native.Model(header.path, repack=repack)
        try:
            context = native.Context(
                model, n_ctx, n_threads=threads, n_threads_batch=n_threads_batch, kv_qtype=kv_qtype
            )
            return cls(header, spec, model, context)
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
    ) -> Iterator[Reply]:
        """Answer messages of {role, content}; the texts of the records together are the reply, whole.

        sampling: the model's own from models.toml by default; seed: drawn by default. MessageError or
        ContextError come at once; ContextError also after the last record that the context has room for.
        """
        ids = self.prompt_ids(messages)
        if max_tokens is not None and max_tokens < 1:
            raise MessageError(f"max_tokens is {max_tokens}; at least 1 is needed")
        if len(ids) > self.n_ctx:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context {self.n_ctx}: shorten it or open with more context"
            )
        self._turn += 1
        chosen = self.spec.sampling if sampling is None else sampling
        return self._reply(ids, max_tokens, chosen, secrets.randbits(32) if seed is None else seed)

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

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that chat() would evaluate."""
        return prompt_ids(self.spec.chat, messages, self.vocabulary)

    def shown(self, reply: str) -> str:
        """A whole reply as the model's authors show it and keep it in the history."""
        return reply.strip() if self.spec.chat.strip_reply else reply

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    def _reply(self, ids: list[int], max_tokens: int | None, sampling: Sampling, seed: int) -> Iterator[Reply]:
        turn, start = self._turn, time.perf_counter()
        self._context.truncate(0)
        self._context.decode(ids, 0)
        with native.Sampler(self._context, sampling, seed) as sampler:
            sampler.accept(ids)
            steps = self._steps(sampler, len(ids), turn)
            stream, n_reply, first = self.vocabulary.stream(), 0, 0.0
            for id in steps:
                now = time.perf_counter()
                first = first or now
                is_stop = id in self.vocabulary.stop_ids
                n_reply += not is_stop
                finish = "stop" if is_stop else "length" if n_reply == max_tokens else None
                text = stream.flush() if is_stop else stream.add(id) + (stream.flush() if finish else "")
                decode_ms = (now - first) * 1e3 / max(1, n_reply - 1 + is_stop)
                yield Reply(id, text, finish, len(ids), n_reply, (first - start) * 1e3, decode_ms)
                if finish:
                    return
            if text := stream.flush():
                yield Reply(id, text, None, len(ids), n_reply, (first - start) * 1e3, decode_ms)
            raise ContextError(
                f"the context of {self.n_ctx} tokens is full: {len(ids)} of the prompt, {n_reply} of the reply; "
                "start anew or open with more context"
            )

    def _steps(self, sampler: native.Sampler, position: int, turn: int) -> Iterator[int]:
        """Sampled ids, each evaluated before the next is drawn, until the context is full."""
        while True:
            id = sampler.sample()
            yield id
            if turn != self._turn:
                raise MessageError("another chat was begun on this engine: one reply at a time")
            if position == self.n_ctx:
                return
            self._context.decode([id], position)
            position += 1

    def close(self) -> None:
        """Free the context and the model."""
        self._turn += 1
        self._context.close()
        self._model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.close()


def _checked_n_ctx(header: Header, n_ctx: int | None) -> int:
    trained = fit.sizes_of(header).n_ctx_train
    if n_ctx is None:
        return min(DEFAULT_N_CTX, trained)
    if not 1 <= n_ctx <= trained:
        raise ContextError(f"a context of {n_ctx} tokens; this model was trained for {trained}, at least 1 is needed")
    return n_ctx
