"""Causal attention over a KV cache: an attention block as a value, and the attention itself in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi2.norm import Norm
from pi2.rope import RopeTable
from pi2.tensor import F32, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One attention block, its residual connection included.  Shapes: d = d_model, h = head_dim.

        y = norm(x);  q, k, v = y @ weights.T + biases;  q_norm, k_norm over each head;  RoPE on q and k
        a = softmax(softcap(scale q.k)) v        each token over itself and those before it, or ``window``
        out = sum_norm(x + post_norm(a @ o.T + o_bias))

    Whatever is None is left out.  Query head i reads KV head ``i // (heads / kv_heads)``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q: Tensor  # (heads * h, d)
    k: Tensor  # (kv_heads * h, d)
    v: Tensor  # (kv_heads * h, d)
    o: Tensor  # (d, heads * h)
    q_bias: F32 | None = None
    k_bias: F32 | None = None
    v_bias: F32 | None = None
    o_bias: F32 | None = None
    norm: Norm | None = None
    q_norm: Norm | None = None  # (h,)
    k_norm: Norm | None = None  # (h,)
    post_norm: Norm | None = None
    sum_norm: Norm | None = None
    rope: RopeTable | None = None
    scale: float = 1.0
    window: int | None = None  # a token sees itself and window - 1 tokens before it
    softcap: float | None = None  # c: scores become c tanh(score / c)


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
