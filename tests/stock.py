"""The stock route, independent of our converter: an unquantized GGUF by the gguf package, then llama_model_quantize."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QType

from engine import native
from engine.registry import Shape
from tests.checkpoints import DTYPES, Weights, stored

NAMES = {
    "qwen": {
        "transformer.wte.weight": "token_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "transformer.h.": "blk.",
        "ln_1.": "attn_norm.",
        "ln_2.": "ffn_norm.",
        "attn.c_attn.": "attn_qkv.",
        "attn.c_proj.": "attn_output.",
        "mlp.w1.": "ffn_up.",
        "mlp.w2.": "ffn_gate.",
        "mlp.c_proj.": "ffn_down.",
    },
    "chatglm3": {
        "transformer.embedding.word_embeddings.": "token_embd.",
        "transformer.encoder.final_layernorm.": "output_norm.",
        "transformer.output_layer.": "output.",
        "transformer.encoder.layers.": "blk.",
        "input_layernorm.": "attn_norm.",
        "post_attention_layernorm.": "ffn_norm.",
        "self_attention.query_key_value.": "attn_qkv.",
        "self_attention.dense.": "attn_output.",
        "mlp.dense_h_to_4h.": "ffn_up.",
        "mlp.dense_4h_to_h.": "ffn_down.",
    },
    "deepseek-llm": {
        "model.embed_tokens.": "token_embd.",
        "model.norm.": "output_norm.",
        "lm_head.": "output.",
        "model.layers.": "blk.",
        "input_layernorm.": "attn_norm.",
        "post_attention_layernorm.": "ffn_norm.",
        "self_attn.q_proj.": "attn_q.",
        "self_attn.k_proj.": "attn_k.",
        "self_attn.v_proj.": "attn_v.",
        "self_attn.o_proj.": "attn_output.",
        "mlp.gate_proj.": "ffn_gate.",
        "mlp.up_proj.": "ffn_up.",
        "mlp.down_proj.": "ffn_down.",
    },
}


def write_unquantized(path: Path, like: Path, family: str, shape: Shape, weights: Weights) -> None:
    """A GGUF in the checkpoint's own float type, with the metadata of the file `like`."""
    reader = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind, *rest = field.types
            writer.add_key_value(field.name, field.contents(), kind, rest[0] if rest else None)
    for name, values in weights.items():
        if not name.endswith("inv_freq"):
            _add(writer, _renamed(family, name), _permuted(family, name, shape, values), DTYPES[family])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def padded(weights: Weights, n_ff: int) -> Weights:
    """ChatGLM3's weights with a wider feed-forward part: zeros below gate, below up, and right of down."""
    made = dict(weights)
    for name, values in weights.items():
        if name.endswith("dense_h_to_4h.weight"):
            gate, up = np.split(values, 2)
            zeros = np.zeros((n_ff - len(gate), values.shape[1]), values.dtype)
            made[name] = np.concatenate([gate, zeros, up, zeros])
        elif name.endswith("dense_4h_to_h.weight"):
            made[name] = np.pad(values, ((0, 0), (0, n_ff - values.shape[1])))
    return made


def quantize_with_llama_cpp(source: Path, out: Path, ftype: int) -> None:
    """llama.cpp's own quantizer."""
    llama_cpp = native._lib  # its log already silenced
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 2
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(params)) == 0


def _renamed(family: str, name: str) -> str:
    for old, new in NAMES[family].items():
        name = name.replace(old, new)
    return name


def _permuted(family: str, name: str, shape: Shape, values: np.ndarray) -> np.ndarray:
    """Rotary order of q and k as the `llama` architecture wants it: row 2i of a head is its row i of the first half."""
    if family != "deepseek-llm" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    order = [i // 2 + (i % 2) * (shape.head_dim // 2) for i in range(shape.head_dim)]
    n_heads = values.shape[0] // shape.head_dim
    return values[[head * shape.head_dim + row for head in range(n_heads) for row in order]]


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
    elif dtype == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        raw = np.frombuffer(stored(values, "BF16"), np.uint8).reshape(values.shape[0], -1)
        writer.add_tensor(name, raw, raw_dtype=QType.BF16)
