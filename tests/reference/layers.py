"""What the three have in common: RMSNorm, SiLU, rotary angles, causal attention."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) * weight, over the last axis (https://arxiv.org/abs/1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def angles(n_ids: int, n_rot: int, base: float) -> np.ndarray:
    """Rotary angles, (n_ids, n_rot / 2): position * base^(-2i / n_rot) (https://arxiv.org/abs/2104.09864)."""
    return np.outer(np.arange(n_ids), base ** (-np.arange(0, n_rot, 2) / n_rot))


def rotate_halves(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotary embedding of x (n_ids, n_head, head_dim): value i turns with value i + head_dim / 2."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_pairs(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotary embedding of x (n_ids, n_head, n_rot): value 2i turns with value 2i + 1."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of q (n_ids, n_head, head_dim) over k, v (n_ids, n_head_kv, head_dim): (n_ids, n_embd)."""
    n_ids, n_head, head_dim = q.shape
    k, v = (np.repeat(x, n_head // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tri(n_ids, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(n_ids, -1)
