"""The three checkpoint layouts: tensor names, shapes, hyperparameters. One table each.

A layer's tensors are written with {n}; shapes are in torch order (rows first) as sums and
products of Shape's fields. Sources: the official config.json and weight index of each model;
llama.cpp, src/models/{qwen,chatglm,llama}.cpp, for what its loader reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.gguf_file import Entry
from convert.source_tensor import SourceTensor
from engine.errors import CheckpointError, UnknownArchitecture
from engine.registry import Model, Shape, models

Row = tuple[str, str, Callable[[Shape], tuple[int, ...]]]  # GGUF name, checkpoint name, torch shape

SUPERBLOCK = 256  # values of a block of the K types
LIMITS = {"n_layer": 512, "n_embd": 1 << 16, "n_head": 1024, "n_head_kv": 1024, "n_ff": 1 << 20, "n_vocab": 1 << 20}


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the output and where it comes from; shapes in torch order.

    rope_head_dim: the rows of each head, this many, go from half-split to interleaved order.
    n_parts: the rows are so many matrices one below the other, each padded on its own.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    rope_head_dim: int | None = None
    n_parts: int = 1


@dataclass(frozen=True, slots=True)
class Family:
    """What is peculiar to one layout."""

    key: str
    rows: tuple[Row, ...]
    hyperparameters: Callable[[Shape], tuple[Entry, ...]]
    config_keys: Mapping[str, str]  # Shape field -> key of config.json
    ignored: tuple[str, ...] = ()  # names of checkpoint tensors that are rightly left out
    permuted: tuple[str, ...] = ()  # GGUF names, without the layer, whose rows are re-ordered
    doubled: tuple[str, ...] = ()  # GGUF names, without the layer, that hold gate and up in one


def _matrix(rows: Callable[[Shape], int], columns: Callable[[Shape], int]) -> Callable[[Shape], tuple[int, ...]]:
    return lambda s: (rows(s), columns(s))


def _vector(length: Callable[[Shape], int]) -> Callable[[Shape], tuple[int, ...]]:
    return lambda s: (length(s),)


def _embd(s: Shape) -> int:
    return s.n_embd


def _ff(s: Shape) -> int:
    return s.n_ff


def _vocab(s: Shape) -> int:
    return s.n_vocab


def _kv(s: Shape) -> int:
    return s.n_head_kv * s.head_dim


def _qkv(s: Shape) -> int:
    return s.n_embd + 2 * _kv(s)


def _gate_and_up(s: Shape) -> int:
    return 2 * s.n_ff


QWEN_ROWS: tuple[Row, ...] = (
    ("token_embd.weight", "transformer.wte.weight", _matrix(_vocab, _embd)),
    ("output_norm.weight", "transformer.ln_f.weight", _vector(_embd)),
    ("output.weight", "lm_head.weight", _matrix(_vocab, _embd)),
    ("blk.{n}.attn_norm.weight", "transformer.h.{n}.ln_1.weight", _vector(_embd)),
    ("blk.{n}.attn_qkv.weight", "transformer.h.{n}.attn.c_attn.weight", _matrix(_qkv, _embd)),
    ("blk.{n}.attn_qkv.bias", "transformer.h.{n}.attn.c_attn.bias", _vector(_qkv)),
    ("blk.{n}.attn_output.weight", "transformer.h.{n}.attn.c_proj.weight", _matrix(_embd, _embd)),
    ("blk.{n}.ffn_norm.weight", "transformer.h.{n}.ln_2.weight", _vector(_embd)),
    ("blk.{n}.ffn_up.weight", "transformer.h.{n}.mlp.w1.weight", _matrix(_ff, _embd)),
    ("blk.{n}.ffn_gate.weight", "transformer.h.{n}.mlp.w2.weight", _matrix(_ff, _embd)),  # w2 goes through silu
    ("blk.{n}.ffn_down.weight", "transformer.h.{n}.mlp.c_proj.weight", _matrix(_embd, _ff)),
)

_GLM = "transformer.encoder.layers.{n}."
CHATGLM3_ROWS: tuple[Row, ...] = (
    ("token_embd.weight", "transformer.embedding.word_embeddings.weight", _matrix(_vocab, _embd)),
    ("output_norm.weight", "transformer.encoder.final_layernorm.weight", _vector(_embd)),
    ("output.weight", "transformer.output_layer.weight", _matrix(_vocab, _embd)),
    ("blk.{n}.attn_norm.weight", _GLM + "input_layernorm.weight", _vector(_embd)),
    ("blk.{n}.attn_qkv.weight", _GLM + "self_attention.query_key_value.weight", _matrix(_qkv, _embd)),
    ("blk.{n}.attn_qkv.bias", _GLM + "self_attention.query_key_value.bias", _vector(_qkv)),
    ("blk.{n}.attn_output.weight", _GLM + "self_attention.dense.weight", _matrix(_embd, _embd)),
    ("blk.{n}.ffn_norm.weight", _GLM + "post_attention_layernorm.weight", _vector(_embd)),
    ("blk.{n}.ffn_up.weight", _GLM + "mlp.dense_h_to_4h.weight", _matrix(_gate_and_up, _embd)),  # gate, then up
    ("blk.{n}.ffn_down.weight", _GLM + "mlp.dense_4h_to_h.weight", _matrix(_embd, _ff)),
)

_LLAMA = "model.layers.{n}."
DEEPSEEK_ROWS: tuple[Row, ...] = (
    ("token_embd.weight", "model.embed_tokens.weight", _matrix(_vocab, _embd)),
    ("output_norm.weight", "model.norm.weight", _vector(_embd)),
    ("output.weight", "lm_head.weight", _matrix(_vocab, _embd)),
    ("blk.{n}.attn_norm.weight", _LLAMA + "input_layernorm.weight", _vector(_embd)),
    ("blk.{n}.attn_q.weight", _LLAMA + "self_attn.q_proj.weight", _matrix(_embd, _embd)),
    ("blk.{n}.attn_k.weight", _LLAMA + "self_attn.k_proj.weight", _matrix(_kv, _embd)),
    ("blk.{n}.attn_v.weight", _LLAMA + "self_attn.v_proj.weight", _matrix(_kv, _embd)),
    ("blk.{n}.attn_output.weight", _LLAMA + "self_attn.o_proj.weight", _matrix(_embd, _embd)),
    ("blk.{n}.ffn_norm.weight", _LLAMA + "post_attention_layernorm.weight", _vector(_embd)),
    ("blk.{n}.ffn_gate.weight", _LLAMA + "mlp.gate_proj.weight", _matrix(_ff, _embd)),
    ("blk.{n}.ffn_up.weight", _LLAMA + "mlp.up_proj.weight", _matrix(_ff, _embd)),
    ("blk.{n}.ffn_down.weight", _LLAMA + "mlp.down_proj.weight", _matrix(_embd, _ff)),
)


def _common(arch: str, s: Shape, n_ff: int, n_rot: int) -> tuple[Entry, ...]:
    return (
        Entry(f"{arch}.context_length", "u32", s.n_ctx_train),
        Entry(f"{arch}.embedding_length", "u32", s.n_embd),
        Entry(f"{arch}.block_count", "u32", s.n_layer),
        Entry(f"{arch}.feed_forward_length", "u32", n_ff),
        Entry(f"{arch}.attention.head_count", "u32", s.n_head),
        Entry(f"{arch}.attention.head_count_kv", "u32", s.n_head_kv),
        Entry(f"{arch}.attention.layer_norm_rms_epsilon", "f32", s.rms_eps),
        Entry(f"{arch}.rope.freq_base", "f32", s.rope_base),
        Entry(f"{arch}.rope.dimension_count", "u32", n_rot),
        Entry(f"{arch}.vocab_size", "u32", s.n_vocab),
    )


_GPT_KEYS = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads"}
FAMILIES = {
    family.key: family
    for family in (
        Family(
            "qwen",
            QWEN_ROWS,
            # llama.cpp halves the feed-forward length of this architecture
            lambda s: _common("qwen", s, 2 * s.n_ff, s.head_dim),
            _GPT_KEYS
            | {"n_ff": "intermediate_size", "n_vocab": "vocab_size", "n_ctx_train": "seq_length"}
            | {"rms_eps": "layer_norm_epsilon", "rope_base": "rotary_emb_base"},
        ),
        Family(
            "chatglm3",
            CHATGLM3_ROWS,
            lambda s: _common("chatglm", s, s.n_ff, s.head_dim // 2),  # rotary on half of each head
            {"n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads"}
            | {"n_head_kv": "multi_query_group_num", "n_ff": "ffn_hidden_size", "n_vocab": "padded_vocab_size"}
            | {"n_ctx_train": "seq_length", "rms_eps": "layernorm_epsilon"},
            ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
            doubled=("ffn_up.weight",),
        ),
        Family(
            "deepseek-llm",
            DEEPSEEK_ROWS,
            lambda s: _common("llama", s, s.n_ff, s.head_dim),
            _GPT_KEYS
            | {"n_head_kv": "num_key_value_heads", "n_ff": "intermediate_size", "n_vocab": "vocab_size"}
            | {"n_ctx_train": "max_position_embeddings", "rms_eps": "rms_norm_eps", "rope_base": "rope_theta"},
            ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
            permuted=("attn_q.weight", "attn_k.weight"),
        ),
    )
}


def recognise(config: Mapping[str, Any]) -> tuple[Model, Family]:
    """The model and family of a config.json; UnknownArchitecture names what was found and what is known."""
    found = config.get("architectures")
    for model in models().values():
        if isinstance(found, list) and set(map(str, found)) & set(model.architectures) and model.family in FAMILIES:
            return model, FAMILIES[model.family]
    known = ", ".join(name for model in models().values() for name in model.architectures)
    raise UnknownArchitecture(f"config.json says architectures {found!r}; those that can be converted are {known}")


def read_shape(model: Model, family: Family, config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json gives, every number checked.

    What the official file leaves out (ChatGLM3's rotary base, DeepSeek's) is the registered
    model's. CheckpointError names the key, the value and what it may be.
    """
    values: dict[str, Any] = {}
    for field in Shape.__dataclass_fields__:
        key = family.config_keys.get(field, "")
        if field in ("rms_eps", "rope_base"):
            values[field] = _positive(config, key, getattr(model.shape, field))
        elif field == "n_head_kv" and not key:
            values[field] = values["n_head"]
        else:
            values[field] = _count(config, key, LIMITS.get(field, 1 << 24))
    values["rope_base"] *= _positive(config, "rope_ratio", 1.0)  # ChatGLM3's long-context variants
    if family.key == "qwen":
        values["n_ff"] = _half("intermediate_size", values["n_ff"])  # w1 and w2 together
    shape = Shape(**values)
    if shape.n_embd % shape.n_head or shape.n_head % shape.n_head_kv or shape.head_dim % 4:
        raise CheckpointError(
            f"config.json: {shape.n_embd} values, {shape.n_head} heads and {shape.n_head_kv} key heads do not divide"
        )
    return shape


def padded_shape(shape: Shape) -> Shape:
    """The shape with a feed-forward width of whole blocks of 256: zeros there leave the function unchanged.

    silu(0) * 0 = 0 goes into columns that are zero, too: what a padded unit adds to the sum is nothing.
    """
    return dataclasses.replace(shape, n_ff=-(-shape.n_ff // SUPERBLOCK) * SUPERBLOCK)


def targets(family: Family, shape: Shape, padded: Shape | None = None) -> tuple[Target, ...]:
    """Every tensor of the output, with the checkpoint tensor that it comes from; padded: the output's shape."""
    padded = padded or shape
    outside = [row for row in family.rows if "{n}" not in row[0]]
    inside = [row for row in family.rows if "{n}" in row[0]]
    return tuple(
        [Target(name, source, size(padded), size(shape)) for name, source, size in outside]
        + [
            Target(
                name.format(n=n),
                source.format(n=n),
                size(padded),
                size(shape),
                shape.head_dim if name.endswith(family.permuted or ("?",)) else None,
                2 if name.endswith(family.doubled or ("?",)) else 1,
            )
            for n in range(shape.n_layer)
            for name, source, size in inside
        ]
    )


def match_targets(
    family: Family, wanted: tuple[Target, ...], tensors: Mapping[str, SourceTensor]
) -> list[tuple[Target, SourceTensor]]:
    """Each target with its tensor; CheckpointError for a tensor missing, unexpected or of another shape or dtype."""
    missing = [target.source for target in wanted if target.source not in tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, the first is {missing[0]}: fetch the checkpoint again"
        )
    sources = {target.source for target in wanted}
    for name in tensors:
        if name not in sources and not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise CheckpointError(f"unexpected tensor {name}: this is not the official layout of {family.key}")
    pairs = [(target, tensors[target.source]) for target in wanted]
    for target, tensor in pairs:
        if tensor.shape != target.source_shape:
            raise CheckpointError(
                f"tensor {tensor.name} has shape {tensor.shape}, config.json makes it {target.source_shape}"
            )
        if tensor.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"tensor {tensor.name} is {tensor.dtype}; BF16, F16 and F32 can be converted")
    return pairs


def model_entries(model: Model, family: Family, shape: Shape) -> list[Entry]:
    """The general and hyperparameter metadata that llama.cpp reads for this architecture."""
    return [
        Entry("general.architecture", "str", model.arch),
        Entry("general.type", "str", "model"),
        Entry("general.name", "str", model.title),
        Entry("general.source.url", "str", f"https://modelscope.cn/models/{model.sources['modelscope'].repo}"),
        *family.hyperparameters(shape),
    ]


def _count(config: Mapping[str, Any], key: str, limit: int) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= limit:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a whole number from 1 to {limit}")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a positive number")
    return float(value)


def _half(key: str, value: int) -> int:
    if value % 2:
        raise CheckpointError(f"config.json: {key} is {value}; expected an even number")
    return value // 2
