"""How much memory a model needs, from its header alone, and whether this machine has it.

    needed = weights + KV cache + compute buffers + Python and libraries

Weights are memory-mapped: they need not be private, but a machine that cannot keep them in its
page cache reads the disk for every token.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import DoesNotFit, GGUFError
from engine.gguf_header import Header
from engine.host import Memory
from engine.registry import Shape
from engine.settings import Settings, defaults

BASE_BYTES = 120_000_000  # Python, numpy and the libraries, measured
KV_BLOCKS = {"F16": (1, 2), "Q8_0": (32, 34)}  # values and bytes of a block
KV_PADDING = 256  # llama.cpp rounds the cache up to this many tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model's shape decides memory; n_ff as the file has it."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def of_shape(cls, shape: Shape) -> Sizes:
        """The sizes of a model that has no file yet."""
        return cls(**{field: getattr(shape, field) for field in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes needed to run a model at n_ctx, and bytes that this machine has."""

    n_ctx: int
    weight_bytes: int
    kv_bytes: int
    compute_bytes: int
    base_bytes: int
    available_bytes: int
    largest_n_ctx: int

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.compute_bytes + self.base_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    def remedy(self) -> str:
        """What to do where it does not fit."""
        if self.largest_n_ctx:
            return f"a context of {self.largest_n_ctx} would fit (--ctx {self.largest_n_ctx})"
        return "close other programs or use a smaller type"


def sizes_of(header: Header) -> Sizes:
    """The sizes that a GGUF file states; GGUFError names a key that is missing or makes no sense."""
    arch = header.metadata.get("general.architecture")
    n_head = _count(header, f"{arch}.attention.head_count")
    return Sizes(
        n_layer=_count(header, f"{arch}.block_count"),
        n_embd=_count(header, f"{arch}.embedding_length"),
        n_head=n_head,
        n_head_kv=_count(header, f"{arch}.attention.head_count_kv", n_head),
        n_ff=_count(header, f"{arch}.feed_forward_length"),
        n_vocab=_n_vocab(header),
        n_ctx_train=_count(header, f"{arch}.context_length"),
    )


def kv_bytes(sizes: Sizes | Shape, n_ctx: int, kv_qtype: str) -> int:
    """Bytes of keys and values of all layers for n_ctx tokens, padded as llama.cpp pads them."""
    block, block_bytes = KV_BLOCKS[kv_qtype]
    n_padded = -(-n_ctx // KV_PADDING) * KV_PADDING
    return 2 * sizes.n_layer * n_padded * sizes.n_head_kv * sizes.head_dim // block * block_bytes


def compute_bytes(sizes: Sizes | Shape, n_ctx: int, n_batch: int) -> int:
    """Bytes of llama.cpp's compute buffers, from above: activations, attention mask, logits of a batch."""
    activations = 4 * sizes.n_embd + 2 * sizes.n_ff
    return 4 * n_batch * (activations + n_ctx + sizes.n_vocab)


def fit(header: Header, n_ctx: int, memory: Memory, settings: Settings | None = None) -> Fit:
    """What running this file at n_ctx takes of this memory."""
    weight_bytes = header.file_bytes - header.data_offset
    found = settings or defaults()
    return estimate(sizes_of(header), weight_bytes, n_ctx, memory, kv_qtype=found.kv_qtype, n_batch=found.n_batch)


def estimate(
    sizes: Sizes | Shape, weight_bytes: int, n_ctx: int, memory: Memory, *, kv_qtype: str = "F16", n_batch: int = 128
) -> Fit:
    """The same from sizes alone, for a file that does not exist yet."""
    spare = memory.available_bytes - weight_bytes - BASE_BYTES - compute_bytes(sizes, 0, n_batch)
    per_step = kv_bytes(sizes, KV_PADDING, kv_qtype) + 4 * n_batch * KV_PADDING
    largest = min(sizes.n_ctx_train, max(0, spare // per_step) * KV_PADDING)
    return Fit(
        n_ctx=n_ctx,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes(sizes, n_ctx, kv_qtype),
        compute_bytes=compute_bytes(sizes, n_ctx, n_batch),
        base_bytes=BASE_BYTES,
        available_bytes=memory.available_bytes,
        largest_n_ctx=largest,
    )


def check(header: Header, n_ctx: int, memory: Memory, settings: Settings | None = None) -> Fit:
    """The fit, or DoesNotFit with what is needed, what there is, and the largest context that would do."""
    found = fit(header, n_ctx, memory, settings)
    if found.fits:
        return found
    raise DoesNotFit(
        f"{header.path.name} at {n_ctx} tokens of context needs {found.needed_bytes / 1e9:.2f} GB of memory "
        f"({found.weight_bytes / 1e9:.2f} weights, {found.kv_bytes / 1e9:.2f} KV cache), "
        f"{found.available_bytes / 1e9:.2f} GB are free: {found.remedy()}"
    )


def _count(header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise GGUFError(f"{header.path}: {key} is {value!r}; expected a whole number above 0")
    return value


def _n_vocab(header: Header) -> int:
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            return tensor.shape[1]
    raise GGUFError(f"{header.path} has no token_embd.weight: it is not a language model")
