"""Qwen-7B: q, k, v in one matrix with a bias; the feed-forward is w1(x) * silu(w2(x)); rotary over halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.registry import Shape
from tests.reference.layers import angles, attend, rms_norm, rotate_halves, silu


def logits(w: Mapping[str, np.ndarray], s: Shape, ids: Sequence[int]) -> np.ndarray:
    """Logits at every position, (n_ids, n_vocab)."""
    angle = angles(len(ids), s.head_dim, s.rope_base)
    x = w["transformer.wte.weight"][list(ids)]
    for n in range(s.n_layer):
        layer = f"transformer.h.{n}."
        h = rms_norm(x, w[layer + "ln_1.weight"], s.rms_eps)
        qkv = h @ w[layer + "attn.c_attn.weight"].T + w[layer + "attn.c_attn.bias"]
        q, k, v = (part.reshape(len(ids), s.n_head, s.head_dim) for part in np.split(qkv, 3, axis=-1))
        x = x + attend(rotate_halves(q, angle), rotate_halves(k, angle), v) @ w[layer + "attn.c_proj.weight"].T
        h = rms_norm(x, w[layer + "ln_2.weight"], s.rms_eps)
        up, gate = h @ w[layer + "mlp.w1.weight"].T, h @ w[layer + "mlp.w2.weight"].T
        x = x + (up * silu(gate)) @ w[layer + "mlp.c_proj.weight"].T
    return rms_norm(x, w["transformer.ln_f.weight"], s.rms_eps) @ w["lm_head.weight"].T
