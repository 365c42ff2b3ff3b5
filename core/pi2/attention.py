"""Causal attention over a KV cache in NumPy: grouped heads, sliding window, softcap."""

from __future__ import annotations

import numpy as np

from pi2.tensor import F32


def attend(
    q: F32, keys: F32, values: F32, *, scale: float, window: int | None = None, softcap: float | None = None
) -> F32:
    """Attention of the last n of T tokens.

    ``q`` (heads, n, head_dim), ``keys`` and ``values`` (kv_heads, T, head_dim); head h reads KV head
    ``h // (heads / kv_heads)``.  A token sees itself and, with ``window``, the window - 1 before it.
    Returns (n, heads * head_dim).
    """
    heads, n, head_dim = q.shape
    kv_heads, total, _ = keys.shape
    if window is not None and total > n + window - 1:  # nothing older can be seen by these tokens
        keys, values = keys[:, -(n + window - 1) :], values[:, -(n + window - 1) :]
        total = n + window - 1
    grouped: F32 = q.reshape(kv_heads, heads // kv_heads, n, head_dim) * np.float32(scale)
    scores: F32 = grouped @ keys[:, None].swapaxes(-1, -2)  # (kv_heads, group, n, total)
    if softcap is not None:
        scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
    if n > 1 or window is not None:
        age = (np.arange(n) + total - n)[:, None] - np.arange(total)  # (n, total)
        hidden = (age < 0) if window is None else (age < 0) | (age >= window)
        scores[..., hidden] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed: F32 = (scores @ values[:, None]).reshape(heads, n, head_dim)
    return np.ascontiguousarray(mixed.swapaxes(0, 1)).reshape(n, heads * head_dim)
