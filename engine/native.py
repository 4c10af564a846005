"""llama.cpp's C API, and nothing else: model, context, sampler, tokens. The only module that touches it.

    with Model(path) as model, Context(model, n_ctx=2048, n_threads=4) as context:
        context.decode(tokenize(model, "你好"), 0)
        id = Sampler(context, sampling, seed=1).sample()

Weights are memory-mapped and not repacked: they stay in the page cache and are shared between
runs. Waiting threads spin for a moment and then sleep, unless the user set OMP_WAIT_POLICY: threads
that go on spinning multiply the time per token as soon as anything else wants the cores.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.metadata
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from engine.errors import ContextError, NativeError
from engine.registry import Sampling
from engine.settings import N_BATCH

# Both are read once, when the library loads. Some microseconds of spinning save most of the wake-ups of an
# idle machine (5 to 8 % of decode here) and cost nothing on a busy one; from 3000 on they do (bench/busy.py).
SPINS = "300"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

PINNED = "0.3.36"  # of llama-cpp-python, as in pyproject.toml
KV_QTYPES = {"F16": 1, "Q8_0": 8}  # ggml's numbers
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
ERROR_LEVEL, CONTINUED = 4, 5  # ggml_log_level
NEEDED_FUNCTIONS = (
    "llama_model_load_from_file",
    "llama_model_free",
    "llama_model_default_params",
    "llama_model_get_vocab",
    "llama_init_from_model",
    "llama_free",
    "llama_context_default_params",
    "llama_decode",
    "llama_get_logits_ith",
    "llama_get_memory",
    "llama_memory_seq_rm",
    "llama_state_seq_get_size",
    "llama_state_seq_get_data",
    "llama_state_seq_set_data",
    "llama_set_n_threads",
    "llama_tokenize",
    "llama_token_to_piece",
    "llama_vocab_n_tokens",
    "llama_model_n_ctx_train",
    "llama_sampler_chain_init",
    "llama_sampler_sample",
    "llama_sampler_accept",
    "llama_sampler_init_penalties",
    "llama_sampler_init_top_k",
    "llama_sampler_init_top_p",
    "llama_sampler_init_min_p",
    "llama_sampler_init_temp",
    "llama_sampler_init_dist",
    "llama_sampler_init_greedy",
    "llama_print_system_info",
)
NEEDED_FIELDS = {
    "llama_model_params": ("load_mode", "use_extra_bufts", "vocab_only", "n_gpu_layers"),
    "llama_context_params": ("n_ctx", "n_batch", "n_ubatch", "n_threads_batch", "flash_attn_type", "type_k", "type_v"),
    "llama_batch": ("n_tokens", "token", "pos", "n_seq_id", "seq_id", "logits"),
}


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """The version of llama-cpp-python and the features that its libraries were compiled with."""

    version: str
    flags: str


def _load_library() -> Any:
    """llama_cpp's low-level module, checked for everything used here; NativeError says what is missing."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise NativeError(f"llama.cpp cannot be loaded ({error}): run make clean && make setup") from error
    if version != PINNED:
        raise NativeError(f"llama-cpp-python {version} is installed, {PINNED} is needed: run make setup")
    check_library(llama_cpp)
    return llama_cpp


def check_library(library: Any) -> None:
    """NativeError naming the first function or struct field that a build of llama.cpp lacks."""
    for name in NEEDED_FUNCTIONS:
        if not hasattr(library, name):
            raise NativeError(f"this llama.cpp has no function {name}: run make clean && make setup")
    for struct, fields in NEEDED_FIELDS.items():
        present = {field[0] for field in getattr(library, struct)._fields_}
        for name in fields:
            if name not in present:
                raise NativeError(f"this llama.cpp has no {struct}.{name}: run make clean && make setup")


_lib = _load_library()
_last_errors: collections.deque[str] = collections.deque(maxlen=3)


@_lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _: Any) -> None:
    """llama.cpp says dozens of lines a load; only what went wrong is worth keeping."""
    if level == ERROR_LEVEL and text.strip():
        _last_errors.append(text.decode("utf-8", errors="replace").strip())


_lib.llama_log_set(_keep_errors, None)
_lib.llama_backend_init()


def build_info() -> BuildInfo:
    """What this llama.cpp is and which CPU features it uses."""
    return BuildInfo(PINNED, _lib.llama_print_system_info().decode("utf-8", errors="replace").strip())


def _failure(what: str) -> NativeError:
    said = "; ".join(_last_errors) or "it gave no reason"
    _last_errors.clear()
    return NativeError(f"{what}: llama.cpp said: {said}")


class _Handle:
    """A pointer that is freed once: by close(), by a with block, or with its object."""

    def __init__(self, pointer: Any, free: Any) -> None:
        self._pointer, self._free = pointer, free

    @property
    def pointer(self) -> Any:
        if self._pointer is None:
            raise NativeError("this model is closed: open it again")
        return self._pointer

    def close(self) -> None:
        """Free it; a second call does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._free(pointer)

    def __del__(self) -> None:
        if getattr(self, "_pointer", None) is not None and self._free is not None:
            self.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.close()


class Model(_Handle):
    """A GGUF file, memory-mapped; vocab_only loads no weights. NativeError when llama.cpp refuses it."""

    def __init__(self, path: Path, *, repack: bool = False, vocab_only: bool = False) -> None:
        params = _lib.llama_model_default_params()
        params.load_mode = _lib.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        _last_errors.clear()
        pointer = _lib.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            raise _failure(f"{path} cannot be loaded")
        super().__init__(pointer, _lib.llama_model_free)
        self._vocab = _lib.llama_model_get_vocab(pointer)
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.n_vocab = int(_lib.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(_lib.llama_model_n_ctx_train(pointer))

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary; NativeError once the model is closed."""
        return self._vocab if self.pointer else None

    def close(self) -> None:
        """Free the model, its contexts first: they point into it."""
        for context in list(getattr(self, "_contexts", ())):
            context.close()
        super().close()


class Context(_Handle):
    """A KV cache of n_ctx tokens and its compute buffers; options as in engine/settings.py."""

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        n_threads: int,
        n_threads_batch: int | None = None,
        n_batch: int = N_BATCH,
        kv_qtype: str = "F16",
        flash_attention: str = "auto",
    ) -> None:
        params = _lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, n_batch, 1
        params.n_threads, params.n_threads_batch = n_threads, n_threads_batch or n_threads
        params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        params.type_k = params.type_v = KV_QTYPES[kv_qtype]
        params.no_perf = True
        _last_errors.clear()
        pointer = _lib.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise _failure(f"no context of {n_ctx} tokens can be made")
        super().__init__(pointer, _lib.llama_free)
        model._contexts.add(self)
        self.model, self.n_ctx, self.n_batch = model, n_ctx, n_batch
        self._batch = _Batch(n_batch)
        self._n_outputs = 0

    def decode(self, ids: Sequence[int] | np.ndarray, position: int, *, logits: str = "last") -> None:
        """Evaluate ids from a position on; keep the logits of the "last", of "all" (one batch at most) or "none".

        ContextError when they do not fit the context, ValueError for an empty or impossible call.
        """
        n_ids = len(ids)
        if n_ids == 0 or (logits == "all" and n_ids > self.n_batch):
            raise ValueError(f"{n_ids} ids with logits={logits!r}; 1 to {self.n_batch} are possible")
        if position + n_ids > self.n_ctx:
            raise ContextError(f"{position + n_ids} tokens do not fit into a context of {self.n_ctx}")
        for start in range(0, n_ids, self.n_batch):
            part = ids[start : start + self.n_batch]
            is_end = start + len(part) == n_ids
            self._decode_batch(part, position + start, logits if is_end else "none")
        self._n_outputs = {"none": 0, "last": 1, "all": n_ids}[logits]

    def _decode_batch(self, ids: Sequence[int] | np.ndarray, position: int, logits: str) -> None:
        status = _lib.llama_decode(self.pointer, self._batch.fill(ids, position, logits))
        if status:
            raise _failure(f"evaluating {len(ids)} tokens at {position} failed with status {status}")

    def logits(self) -> np.ndarray:
        """The logits of the last id evaluated: (n_vocab,) float32, a view that the next decode overwrites."""
        if not self._n_outputs:
            raise ValueError("the last call kept no logits")
        return self.row(-1)

    def logits_all(self) -> np.ndarray:
        """The logits of each id of the last decode(logits="all"): (n_ids, n_vocab) float32, a copy."""
        return np.stack([self.row(i) for i in range(self._n_outputs)])

    def row(self, index: int) -> np.ndarray:
        """The logits of one row of the last decode, -1 for the last: a view that the next decode overwrites."""
        row = _lib.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(row, shape=(self.model.n_vocab,))

    def truncate(self, position: int) -> None:
        """Forget everything from a position on."""
        _lib.llama_memory_seq_rm(_lib.llama_get_memory(self.pointer), 0, position, -1)

    def save_state(self) -> np.ndarray:
        """The keys and values of everything evaluated, as llama.cpp writes them: (n_bytes,) uint8."""
        state = np.empty(int(_lib.llama_state_seq_get_size(self.pointer, 0)), np.uint8)
        written = int(_lib.llama_state_seq_get_data(self.pointer, _bytes_of(state), state.nbytes, 0))
        if written != state.nbytes:
            raise _failure(f"saving the state wrote {written} of {state.nbytes} bytes")
        return state

    def load_state(self, state: np.ndarray) -> None:
        """Take up a state that save_state() gave, and nothing else; NativeError when llama.cpp refuses it."""
        if int(_lib.llama_state_seq_set_data(self.pointer, _bytes_of(state), state.nbytes, 0)) == 0:
            self.truncate(0)
            raise _failure(f"a state of {state.nbytes} bytes cannot be taken up")

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """How many threads evaluate one id, and how many a batch, from now on."""
        _lib.llama_set_n_threads(self.pointer, n_threads, n_threads_batch)


def _bytes_of(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Batch:
    """A llama_batch for one sequence whose arrays are made once: a token must not pay for them."""

    def __init__(self, n_max: int) -> None:
        self._ids = np.zeros(n_max, np.int32)
        self._positions = np.zeros(n_max, np.int32)
        self._n_sequences = np.ones(n_max, np.int32)
        self._outputs = np.zeros(n_max, np.int8)
        self._sequence = ctypes.c_int32(0)
        self._sequences = (ctypes.POINTER(ctypes.c_int32) * n_max)(*[ctypes.pointer(self._sequence)] * n_max)
        self.struct = _lib.llama_batch()
        self.struct.token = self._ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.pos = self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.n_seq_id = self._n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self.struct.seq_id = self._sequences

    def fill(self, ids: Sequence[int] | np.ndarray, position: int, logits: str) -> Any:
        n_ids = len(ids)
        if n_ids == 1:  # every decoded token: plain stores cost a tenth of array slices
            self._ids[0], self._positions[0] = ids[0], position
        else:
            self._ids[:n_ids] = ids
            self._positions[:n_ids] = np.arange(position, position + n_ids)
            self._outputs[:n_ids] = logits == "all"
        self._outputs[n_ids - 1] = logits != "none"
        self.struct.n_tokens = n_ids
        return self.struct


class Sampler(_Handle):
    """llama.cpp's sampler chain for one reply: penalty, temperature, top-k, top-p, min-p, draw, all in C.

    The order is that of the model authors' library; temperature 0 takes the likeliest id.
    """

    def __init__(self, context: Context, sampling: Sampling, seed: int) -> None:
        chain = _lib.llama_sampler_chain_init(_lib.llama_sampler_chain_default_params())
        super().__init__(chain, _lib.llama_sampler_free)
        self._context = context
        # llama.cpp's greedy sampler first copies the whole vocabulary: a tenth of a millisecond for nothing
        self._is_argmax = sampling.temperature == 0 and sampling.repeat_penalty == 1.0
        for link in _links(context, sampling, seed):
            _lib.llama_sampler_chain_add(chain, link)

    def accept(self, ids: Sequence[int]) -> None:
        """Make ids count for the repeat penalty: those of the prompt."""
        for id in ids:
            _lib.llama_sampler_accept(self.pointer, id)

    def sample(self, row: int = -1) -> int:
        """Draw an id from the last logits, or from those of a row of them; it counts for the penalty from now on."""
        if self._is_argmax:
            return int(self._context.row(row).argmax())
        return int(_lib.llama_sampler_sample(self.pointer, self._context.pointer, row))


def _links(context: Context, sampling: Sampling, seed: int) -> list[Any]:
    links = []
    if sampling.repeat_penalty != 1.0:
        last_n = context.n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n
        n_vocab = context.model.n_vocab
        links.append(_lib.llama_sampler_init_penalties(n_vocab, last_n, sampling.repeat_penalty, 0.0, 0.0))
    if sampling.temperature == 0:
        return [*links, _lib.llama_sampler_init_greedy()]
    links.append(_lib.llama_sampler_init_temp(sampling.temperature))
    if sampling.top_k > 0:
        links.append(_lib.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        links.append(_lib.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        links.append(_lib.llama_sampler_init_min_p(sampling.min_p, 1))
    return [*links, _lib.llama_sampler_init_dist(seed & 0xFFFFFFFF)]


def tokenize(model: Model, text: str, parse_special: bool = False) -> list[int]:
    """Ids of a text; without parse_special no control token is ever matched. No begin or end is added."""
    data = text.encode("utf-8")
    n_max = len(data) + 8
    buffer = (ctypes.c_int32 * n_max)()
    count = _lib.llama_tokenize(model.vocab, data, len(data), buffer, n_max, False, parse_special)
    if count < 0:
        raise _failure(f"a text of {len(data)} bytes cannot be tokenized")
    return buffer[:count]


def piece(model: Model, id: int) -> bytes:
    """The bytes of any id, control tokens spelled out, whatever their length."""
    n_max = 64
    while True:
        buffer = ctypes.create_string_buffer(n_max)
        count = _lib.llama_token_to_piece(model.vocab, id, buffer, n_max, 0, True)
        if count >= 0:
            return buffer.raw[:count]
        n_max = -count
