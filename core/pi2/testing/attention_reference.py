"""What an attention block must compute, in float64, and how far off it may be.

``tolerance`` t is the backend's (pi2.testing.reference): an error of t times the sum of the magnitudes of
the terms, in every sum.  It propagates, with da the error of a:

    norm      c / r, where r = root(mean c^2 + eps):  dr <= rms(dc);  (dc + |c| dr / r) / (r - dr)
    matrix    y W:      dy |W| + t (|y| + dy) |W|
    scores    q.k:      |q| dk + dq |k| + dq dk + t (|q| + dq)(|k| + dk), and t of what exp subtracts
    softmax   p:        p (exp(2 D) - 1), D the largest error of a score that the token sees
    mixture   p v:      dp |v| + (p + dp) dv + t (p + dp)(|v| + dv)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi2.attention import AttentionSpec
from pi2.norm import Norm
from pi2.rope import RopeTable
from pi2.tensor import F32, Tensor
from pi2.testing.reference import F64, FLUSH, Expected


@dataclass(frozen=True, slots=True)
class ExpectedAttention:
    """Hidden states behind the block (n, d); what is appended to the cache (kv_heads, n, head_dim)."""

    output: Expected
    keys: Expected
    values: Expected


def attention(
    spec: AttentionSpec, x: F32, keys: F32, values: F32, tolerance: float, *, halves: bool = False
) -> ExpectedAttention:
    """The block of x (n, d) behind the cached ``keys`` and ``values`` (kv_heads, start, head_dim).

    ``halves``: what is appended to the cache is rounded to float16.
    """
    t, start = tolerance, keys.shape[1]
    inputs = Expected(x.astype(np.float64), np.zeros(x.shape))
    y = _norm(spec.norm, inputs, t)
    q, k = (
        _rotate(spec.rope, _norm(norm, _heads(_linear(weight, bias, y, t), spec.head_dim), t), start, t)
        for weight, bias, norm in ((spec.q, spec.q_bias, spec.q_norm), (spec.k, spec.k_bias, spec.k_norm))
    )
    v = _heads(_linear(spec.v, spec.v_bias, y, t), spec.head_dim)
    if halves:
        k, v = _rounded(k), _rounded(v)
    mixed = _attend(spec, q, _behind(keys, k), _behind(values, v), t)
    out = _norm(spec.post_norm, _linear(spec.o, spec.o_bias, mixed, t), t)
    bound = out.bound + t * (np.abs(inputs.values) + np.abs(out.values)) + FLUSH
    return ExpectedAttention(_norm(spec.sum_norm, Expected(inputs.values + out.values, bound), t), k, v)


def _linear(weight: Tensor, bias: F32 | None, x: Expected, t: float) -> Expected:
    w = weight.to_f32().astype(np.float64)
    b = np.zeros(len(w)) if bias is None else bias.astype(np.float64)
    bound = x.bound @ np.abs(w).T + t * ((np.abs(x.values) + x.bound) @ np.abs(w).T + np.abs(b))
    return Expected(x.values @ w.T + b, bound + FLUSH)


def _norm(norm: Norm | None, x: Expected, t: float) -> Expected:
    if norm is None:
        return x
    c, dc, weight = x.values, x.bound, np.abs(norm.weight.astype(np.float64))
    if norm.kind == "layer":
        mean = c.mean(axis=-1, keepdims=True)
        dc = dc + dc.mean(axis=-1, keepdims=True) + t * (np.abs(c) + np.abs(c).mean(axis=-1, keepdims=True))
        c = c - mean
    r = np.sqrt(np.mean(np.square(c), axis=-1, keepdims=True) + norm.eps)
    dr = np.sqrt(np.mean(np.square(dc), axis=-1, keepdims=True)) + t * r
    off = np.full(c.shape, 2 * np.sqrt(c.shape[-1]))  # |c / r| <= root d, right or wrong
    np.divide(dc + np.abs(c) * dr / r, r - dr, out=off, where=r > dr)
    y, bias = c / r * norm.weight, np.zeros(1) if norm.bias is None else norm.bias.astype(np.float64)
    bound = weight * np.minimum(off, 2 * np.sqrt(c.shape[-1])) + t * (np.abs(y) + np.abs(bias)) + FLUSH
    return Expected(y + bias, bound)


def _heads(x: Expected, head_dim: int) -> Expected:
    """(n, heads * head_dim) -> (heads, n, head_dim)."""
    shape = (len(x.values), x.values.shape[1] // head_dim, head_dim)
    return Expected(x.values.reshape(shape).swapaxes(0, 1), x.bound.reshape(shape).swapaxes(0, 1))


def _rotate(rope: RopeTable | None, x: Expected, start: int, t: float) -> Expected:
    if rope is None:
        return x
    tables = rope.until(start + x.values.shape[1])
    cos, sin = (table[start:].astype(np.float64) for table in tables)  # (n, dims / 2)
    half = cos.shape[1]

    def turned(a: F64, cos: F64, against: F64, along: F64) -> F64:
        first, second = a[..., :half], a[..., half : 2 * half]
        pair = (first * cos + second * against, second * cos + first * along)
        return np.concatenate((*pair, a[..., 2 * half :]), axis=-1)

    def magnitudes(a: F64) -> F64:
        return turned(a, np.abs(cos), np.abs(sin), np.abs(sin))

    bound = magnitudes(x.bound) + t * magnitudes(np.abs(x.values))
    return Expected(turned(x.values, cos, -sin, sin), bound)


def _rounded(x: Expected) -> Expected:
    """To float16, by half a unit in the last place."""
    return Expected(x.values, x.bound + 2.0**-11 * (np.abs(x.values) + x.bound) + 2.0**-25)


def _behind(cached: F32, new: Expected) -> Expected:
    """The cached positions, exact, and the new ones behind them."""
    values = np.concatenate((cached.astype(np.float64), new.values), axis=1)
    return Expected(values, np.concatenate((np.zeros(cached.shape), new.bound), axis=1))


def _attend(spec: AttentionSpec, q: Expected, k: Expected, v: Expected, t: float) -> Expected:
    """(heads, n, h) over (kv_heads, total, h) -> (n, heads * h)."""
    heads, n, h = q.values.shape
    group, total = heads // len(k.values), k.values.shape[1]

    def dots(a: F64, b: F64) -> F64:  # (heads, n, total)
        product: F64 = a @ np.repeat(b, group, axis=0).swapaxes(-1, -2)
        return product

    qa, ka = np.abs(q.values), np.abs(k.values)
    scores = spec.scale * dots(q.values, k.values)
    errors = dots(qa, k.bound) + dots(q.bound, ka + k.bound) + t * dots(qa + q.bound, ka + k.bound)
    errors *= abs(spec.scale)
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    age = (np.arange(n) + total - n)[:, None] - np.arange(total)
    seen = (age >= 0) & (age < (total if spec.window is None else spec.window))  # (n, total)
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    errors += t * np.where(seen, np.abs(scores) + np.abs(largest), 0)
    p = np.exp(scores - largest)
    p /= p.sum(axis=-1, keepdims=True)
    worst = np.where(seen, errors, 0).max(axis=-1, keepdims=True, initial=0)
    dp = np.minimum(p * np.expm1(np.minimum(2 * worst + t, 100)), 1)  # of numbers from 0 to 1
    va, dv = (np.repeat(a, group, axis=0) for a in (np.abs(v.values), v.bound))
    values = p @ np.repeat(v.values, group, axis=0)
    bound = dp @ va + (p + dp) @ dv + t * ((p + dp) @ (va + dv))
    return Expected(*(a.swapaxes(0, 1).reshape(n, heads * h) for a in (values, bound)))
