"""Small checkpoints in the official layouts, with made-up weights whose true values the tests know.

The names, config keys and file layouts are written out here, from the official repositories, apart
from the converter's tables: each holds the other to account.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.registry import Shape
from tests.tokenizers import copy_genuine_tokenizer, write_made_tokenizer

FAMILIES = ("qwen", "chatglm3", "deepseek-llm")
N_VOCAB = 1280  # above the made tokenizers' sizes, so that padding is exercised
SHAPES = {
    "qwen": Shape(4, 256, 4, 4, 512, N_VOCAB, 512, 1e-6, 10000.0),
    # 288 is no multiple of 256, as ChatGLM3's 13696 is none
    "chatglm3": Shape(4, 256, 4, 2, 288, N_VOCAB, 512, 1e-5, 10000.0),
    "deepseek-llm": Shape(4, 256, 4, 4, 512, N_VOCAB, 512, 1e-6, 10000.0),
}
GENUINE_N_VOCAB = {"qwen": 151936, "chatglm3": 65024, "deepseek-llm": 102400}
DTYPES = {"qwen": "BF16", "chatglm3": "F16", "deepseek-llm": "BF16"}
LAYOUTS = {"qwen": "safetensors", "chatglm3": "both", "deepseek-llm": "bin"}
Weights = Mapping[str, np.ndarray]


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    layout: str | None = None,
    n_shards: int = 2,
    seed: int = 0,
    shape: Shape | None = None,
    tokenizer: str = "made",
    edit: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """Write a whole checkpoint folder; `edit` may change the weights before they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = shape or shape_of(family, tokenizer)
    weights = make_weights(family, shape, seed)
    if edit:
        edit(weights)
    (folder / "config.json").write_text(json.dumps(config(family, shape)), encoding="utf-8")
    layout = layout or LAYOUTS[family]
    if layout in ("safetensors", "both"):
        write_shards(folder, weights, DTYPES[family], n_shards, "safetensors")
    if layout in ("bin", "both"):
        write_shards(folder, weights, DTYPES[family], n_shards, "bin")
    {"made": write_made_tokenizer, "genuine": copy_genuine_tokenizer, "none": lambda *_: None}[tokenizer](
        folder, family
    )
    for name in (f"modeling_{family[:4]}.py", f"tokenization_{family[:4]}.py"):
        (folder / name).write_text('raise SystemExit("code from a checkpoint was run")\n', encoding="utf-8")
    return folder


def shape_of(family: str, tokenizer: str = "made") -> Shape:
    """The small shape, with the official number of rows for the genuine tokenizer."""
    small = SHAPES[family]
    return replace(small, n_vocab=GENUINE_N_VOCAB[family]) if tokenizer == "genuine" else small


def config(family: str, s: Shape) -> dict[str, Any]:
    """config.json with the official keys."""
    if family == "qwen":
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
            "model_type": "qwen",
            "bf16": True,
            "hidden_size": s.n_embd,
            "intermediate_size": 2 * s.n_ff,
            "kv_channels": s.head_dim,
            "layer_norm_epsilon": s.rms_eps,
            "no_bias": True,
            "num_attention_heads": s.n_head,
            "num_hidden_layers": s.n_layer,
            "rotary_emb_base": s.rope_base,
            "rotary_pct": 1.0,
            "seq_length": s.n_ctx_train,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "tie_word_embeddings": False,
            "vocab_size": s.n_vocab,
        }
    if family == "chatglm3":
        return {
            "architectures": ["ChatGLMModel"],
            "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
            "model_type": "chatglm",
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "ffn_hidden_size": s.n_ff,
            "hidden_size": s.n_embd,
            "kv_channels": s.head_dim,
            "layernorm_epsilon": s.rms_eps,
            "multi_query_attention": True,
            "multi_query_group_num": s.n_head_kv,
            "num_attention_heads": s.n_head,
            "num_layers": s.n_layer,
            "padded_vocab_size": s.n_vocab,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": s.n_ctx_train,
            "tie_word_embeddings": False,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": s.n_embd,
        "intermediate_size": s.n_ff,
        "max_position_embeddings": s.n_ctx_train,
        "num_attention_heads": s.n_head,
        "num_hidden_layers": s.n_layer,
        "num_key_value_heads": s.n_head_kv,
        "rms_norm_eps": s.rms_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": s.n_vocab,
    }


def make_weights(family: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up weights by official name, float32, already rounded to the family's stored type."""
    rng = np.random.default_rng(seed)
    return {name: rounded(_values(rng, name, size), DTYPES[family]) for name, size in official_tensors(family, shape)}


def _values(rng: np.random.Generator, name: str, size: tuple[int, ...]) -> np.ndarray:
    if name.endswith("inv_freq"):
        return (10000.0 ** -np.linspace(0, 1, size[0])).astype(np.float32)
    mean, spread = (0.0, size[1] ** -0.5) if len(size) > 1 else (0.0, 0.2) if name.endswith("bias") else (1.0, 0.1)
    return rng.normal(mean, spread, size).astype(np.float32)


def official_tensors(family: str, s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of an official checkpoint, with its shape in torch order."""
    kv = s.n_head_kv * s.head_dim
    if family == "qwen":
        yield "transformer.wte.weight", (s.n_vocab, s.n_embd)
        for n in range(s.n_layer):
            layer = f"transformer.h.{n}."
            yield layer + "ln_1.weight", (s.n_embd,)
            yield layer + "attn.c_attn.weight", (3 * s.n_embd, s.n_embd)
            yield layer + "attn.c_attn.bias", (3 * s.n_embd,)
            yield layer + "attn.c_proj.weight", (s.n_embd, s.n_embd)
            yield layer + "ln_2.weight", (s.n_embd,)
            yield layer + "mlp.w1.weight", (s.n_ff, s.n_embd)
            yield layer + "mlp.w2.weight", (s.n_ff, s.n_embd)
            yield layer + "mlp.c_proj.weight", (s.n_embd, s.n_ff)
        yield "transformer.ln_f.weight", (s.n_embd,)
        yield "lm_head.weight", (s.n_vocab, s.n_embd)
    elif family == "chatglm3":
        yield "transformer.embedding.word_embeddings.weight", (s.n_vocab, s.n_embd)
        yield "transformer.rotary_pos_emb.inv_freq", (s.head_dim // 4,)
        for n in range(s.n_layer):
            layer = f"transformer.encoder.layers.{n}."
            yield layer + "input_layernorm.weight", (s.n_embd,)
            yield layer + "self_attention.query_key_value.weight", (s.n_embd + 2 * kv, s.n_embd)
            yield layer + "self_attention.query_key_value.bias", (s.n_embd + 2 * kv,)
            yield layer + "self_attention.dense.weight", (s.n_embd, s.n_embd)
            yield layer + "post_attention_layernorm.weight", (s.n_embd,)
            yield layer + "mlp.dense_h_to_4h.weight", (2 * s.n_ff, s.n_embd)
            yield layer + "mlp.dense_4h_to_h.weight", (s.n_embd, s.n_ff)
        yield "transformer.encoder.final_layernorm.weight", (s.n_embd,)
        yield "transformer.output_layer.weight", (s.n_vocab, s.n_embd)
    else:
        yield "model.embed_tokens.weight", (s.n_vocab, s.n_embd)
        for n in range(s.n_layer):
            layer = f"model.layers.{n}."
            for name, rows in (("q", s.n_embd), ("k", kv), ("v", kv), ("o", s.n_embd)):
                yield layer + f"self_attn.{name}_proj.weight", (rows, s.n_embd)
            yield layer + "mlp.gate_proj.weight", (s.n_ff, s.n_embd)
            yield layer + "mlp.up_proj.weight", (s.n_ff, s.n_embd)
            yield layer + "mlp.down_proj.weight", (s.n_embd, s.n_ff)
            yield layer + "input_layernorm.weight", (s.n_embd,)
            yield layer + "post_attention_layernorm.weight", (s.n_embd,)
        yield "model.norm.weight", (s.n_embd,)
        yield "lm_head.weight", (s.n_vocab, s.n_embd)


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Float32 values as the bytes of a stored type; bf16 rounds to nearest, ties to even."""
    if dtype == "F32":
        return values.astype(np.float32).tobytes()
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    bits = values.astype(np.float32).view(np.uint32)
    upper = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    upper = np.where(np.isnan(values), 0x7FC0, upper)
    return upper.astype(np.uint16).tobytes()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values after a round trip through a stored type."""
    raw = stored(values, dtype)
    if dtype == "BF16":
        wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(values.shape)
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    return np.frombuffer(raw, kind).astype(np.float32).reshape(values.shape)


def write_shards(folder: Path, weights: Weights, dtype: str, n_shards: int, layout: str) -> None:
    """Weights over n_shards files and their index, as the hubs have them."""
    stem, ending, index = {
        "safetensors": ("model", "safetensors", "model.safetensors.index.json"),
        "bin": ("pytorch_model", "bin", "pytorch_model.bin.index.json"),
    }[layout]
    write = {"safetensors": write_safetensors, "bin": write_torch_bin}[layout]
    names = list(weights)
    weight_map = {}
    for i in range(n_shards):
        shard = f"{stem}-{i + 1:05}-of-{n_shards:05}.{ending}"
        part = names[len(names) * i // n_shards : len(names) * (i + 1) // n_shards]
        write(folder / shard, {name: weights[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, shard)
    total = sum(len(stored(values, dtype)) for values in weights.values())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_safetensors(path: Path, weights: Weights, dtype: str) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, values in weights.items():
        blob = stored(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_torch_bin(path: Path, weights: Weights, dtype: str) -> None:
    """One .bin file as torch.save lays it out: stored zip entries aligned to 64 bytes, a pickle of protocol 2."""
    blobs = {str(i): stored(values, dtype) for i, values in enumerate(weights.values())}
    entries = {"data.pkl": torch_pickle(weights, dtype), "byteorder": b"little"}
    entries |= {f"data/{key}": blob for key, blob in blobs.items()} | {"version": b"3\n"}
    write_zip(path, entries)


def write_zip(path: Path, entries: Mapping[str, bytes], stem: str = "archive") -> None:
    """A zip with stored entries whose data are aligned to 64 bytes through the extra field, as torch's are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(f"{stem}/{name}")
            start = archive.fp.tell() + 30 + len(info.filename.encode()) + 4  # type: ignore[union-attr]
            fill = -start % 64
            info.extra = struct.pack("<2sH", b"FB", fill) + b"Z" * fill
            archive.writestr(info, data)


def torch_pickle(weights: Weights, dtype: str) -> bytes:
    """The pickle of an OrderedDict of tensors."""
    return torch_pickle_of([(name, values.shape) for name, values in weights.items()], dtype)


def torch_pickle_of(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """The same from names and shapes alone, opcode by opcode as torch writes it; storages are numbered."""
    storage = {"BF16": b"BFloat16Storage", "F16": b"HalfStorage", "F32": b"FloatStorage"}[dtype]
    out = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, shape) in enumerate(tensors):
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += _text("storage") + b"ctorch\n" + storage + b"\n" + _text(str(key)) + _text("cpu")
        out += _number(math.prod(shape)) + b"tQ" + _number(0)
        out += _tuple(shape) + _tuple(tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u}" + _text("_metadata") + b"ccollections\nOrderedDict\n)Rsb."


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_number(value) for value in values) + b"t"
