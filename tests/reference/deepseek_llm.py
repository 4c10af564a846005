"""DeepSeek-LLM-7B: the Llama architecture; no biases, rotary over halves, SwiGLU in two matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.registry import Shape
from tests.reference.layers import angles, attend, rms_norm, rotate_halves, silu


def logits(w: Mapping[str, np.ndarray], s: Shape, ids: Sequence[int]) -> np.ndarray:
    """Logits at every position, (n_ids, n_vocab)."""
    angle = angles(len(ids), s.head_dim, s.rope_base)
    x = w["model.embed_tokens.weight"][list(ids)]
    for n in range(s.n_layer):
        layer = f"model.layers.{n}."
        h = rms_norm(x, w[layer + "input_layernorm.weight"], s.rms_eps)
        q, k, v = (
            (h @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, s.head_dim) for name in "qkv"
        )
        x = x + attend(rotate_halves(q, angle), rotate_halves(k, angle), v) @ w[layer + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], s.rms_eps)
        gate, up = h @ w[layer + "mlp.gate_proj.weight"].T, h @ w[layer + "mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], s.rms_eps) @ w["lm_head.weight"].T
