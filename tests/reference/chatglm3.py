"""ChatGLM3-6B: few key heads; q, k, v with a bias; rotary over pairs in half of each head; SwiGLU in one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.registry import Shape
from tests.reference.layers import angles, attend, rms_norm, rotate_pairs, silu


def logits(w: Mapping[str, np.ndarray], s: Shape, ids: Sequence[int]) -> np.ndarray:
    """Logits at every position, (n_ids, n_vocab)."""
    n_rot, n_kv = s.head_dim // 2, s.n_head_kv * s.head_dim
    angle = angles(len(ids), n_rot, s.rope_base)
    x = w["transformer.embedding.word_embeddings.weight"][list(ids)]
    for n in range(s.n_layer):
        layer = f"transformer.encoder.layers.{n}."
        attention, mlp = layer + "self_attention.", layer + "mlp."
        h = rms_norm(x, w[layer + "input_layernorm.weight"], s.rms_eps)
        qkv = h @ w[attention + "query_key_value.weight"].T + w[attention + "query_key_value.bias"]
        q, k, v = np.split(qkv, [s.n_embd, s.n_embd + n_kv], axis=-1)
        q, k, v = (part.reshape(len(ids), -1, s.head_dim) for part in (q, k, v))
        q, k = (np.concatenate([rotate_pairs(p[..., :n_rot], angle), p[..., n_rot:]], axis=-1) for p in (q, k))
        x = x + attend(q, k, v) @ w[attention + "dense.weight"].T
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], s.rms_eps)
        gate, up = np.split(h @ w[mlp + "dense_h_to_4h.weight"].T, 2, axis=-1)
        x = x + (silu(gate) * up) @ w[mlp + "dense_4h_to_h.weight"].T
    x = rms_norm(x, w["transformer.encoder.final_layernorm.weight"], s.rms_eps)
    return x @ w["transformer.output_layer.weight"].T
