"""An attention block as one static graph: projections, norms of heads, RoPE, softmax, output.  In the worker.

M rows of tokens behind C older ones (what is not there is masked), h numbers a head.  Inputs are scaled as
``pi2_backend_qnn.attention`` says.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pi2.tensor import F32, Tensor

from pi2_backend_qnn.graph import Graph
from pi2_backend_qnn.placed import AttentionShape


class AttentionGraph:
    """x (1, M, d), factors for q, k and v (1, 1, M, 1), mask (1, 1, heads / kv_heads M, C + M), and
    past_k, past_v (1, kv_heads, C, h) if there are any  ->  y (1, M, d), k, v (1, kv_heads, M, h).
    """

    def __init__(
        self, rows: int, context: int, shape: AttentionShape, weights: Mapping[str, Tensor],
        vectors: Mapping[str, F32], exponents: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.g, self.rows, self.context, self.shape = Graph(rows), rows, context, shape
        self.weights, self.vectors, self.exponents = weights, vectors, exponents

    def build(self) -> bytes:
        g, s, rows, context = self.g, self.shape, self.rows, self.context
        x = g.input("x", 1, rows, self.weights["q"].cols)
        if any(f"{name}_bias" in self.vectors for name in "qkv"):
            g.input("ones", 1, rows, 1)
        if s.dims:
            self.turns = [g.input(name, 1, 1, rows, s.dims // 2) for name in ("cos", "sin")]
        made = {name: self._heads(x, name) for name in "qkv"}
        q, k, v = (g.add("Mul", f"{n}.true", made[n], g.input(f"{n}_by", 1, 1, rows, 1)) for n in "qkv")
        if context:
            past = [g.input(f"past_{name}", 1, s.kv_heads, context, s.head_dim) for name in "kv"]
            k, v = (
                g.add("Concat", f"all.{n}", p, new, axis=2)
                for n, p, new in zip("kv", past, (k, v), strict=True)
            )
        many = s.heads // s.kv_heads * rows
        q = self._reshape("q.groups", q, 1, s.kv_heads, many, s.head_dim)
        scores = g.add("MatMul", "scores", q, g.add("Transpose", "k.turned", k, perm=[0, 1, 3, 2]))
        if s.softcap is not None:
            cap = g.constant("cap", np.full((1, 1, 1, 1), s.softcap, np.float32))
            share = g.add(
                "Mul",
                "scores.share",
                scores,
                g.constant("cap.by", np.full((1, 1, 1, 1), 1 / s.softcap, np.float32)),
            )
            scores = g.add("Mul", "scores.capped", g.add("Tanh", "scores.tanh", share), cap)
        scores = g.add("Add", "seen", scores, g.input("mask", 1, 1, many, context + rows))
        mixed = g.add("MatMul", "mixed", g.add("Softmax", "shares", scores, axis=-1), v)
        mixed = self._reshape("mixed.heads", mixed, 1, s.heads, rows, s.head_dim)
        mixed = g.add("Transpose", "mixed.tokens", mixed, perm=[0, 2, 1, 3])
        mixed = self._reshape("mixed.rows", mixed, 1, rows, s.heads * s.head_dim)
        o = self.weights["o"]
        y = g.linear("y", mixed, o.data, o.dtype, self.exponents["o"])
        new = (1, s.kv_heads, rows, s.head_dim)
        return g.model({y: (1, rows, o.rows), made["k"]: new, made["v"]: new})

    def _heads(self, x: str, name: str) -> str:
        """q, k or v behind its norm and RoPE, (1, heads, M, h)."""
        g, s, weight = self.g, self.shape, self.weights[name]
        y = g.linear(name, x, weight.data, weight.dtype, self.exponents[name])
        if (bias := self.vectors.get(f"{name}_bias")) is not None:
            scaled = np.ldexp(bias, -self.exponents[name])[None, None]
            y = g.add(
                "Add",
                f"{name}.biased",
                y,
                g.add("Mul", f"{name}.bias", "ones", g.constant(f"{name}.b", scaled)),
            )
        y = self._reshape(f"{name}.split", y, 1, self.rows, weight.rows // s.head_dim, s.head_dim)
        y = g.add("Transpose", f"{name}.heads", y, perm=[0, 2, 1, 3])
        if name in s.norms:
            y = self._normed(y, name)
        return self._rotated(y, name) if s.dims and name != "v" else y

    def _normed(self, x: str, name: str) -> str:
        """By the root mean square of each head; "layer" centres first.  ``eps`` is scaled like x, squared."""
        g = self.g
        if self.shape.norms[name] == "layer":
            mean = g.add("ReduceMean", f"{name}.mean", x, g.axis(3), keepdims=1)
            x = g.add("Sub", f"{name}.centred", x, mean)
        squares = g.add("Mul", f"{name}.squares", x, x)
        square = g.add("ReduceMean", f"{name}.square", squares, g.axis(3), keepdims=1)
        eps = g.input(f"{name}_eps", 1, 1, self.rows, 1)
        size = g.add("Sqrt", f"{name}.size", g.add("Add", f"{name}.eps", square, eps))
        weight = g.constant(f"{name}.norm", self.vectors[f"{name}_norm"][None, None, None])
        y = g.add("Mul", f"{name}.normed", g.add("Div", f"{name}.unit", x, size), weight)
        if (bias := self.vectors.get(f"{name}_norm_bias")) is not None:
            y = g.add("Add", f"{name}.shifted", y, g.constant(f"{name}.shift", bias[None, None, None]))
        return y

    def _rotated(self, x: str, name: str) -> str:
        g, half, dims = self.g, self.shape.dims // 2, self.shape.dims
        first, second = self._slice(f"{name}.first", x, 0, half), self._slice(f"{name}.second", x, half, dims)
        cos, sin = self.turns

        def times(label: str, a: str, b: str) -> str:
            return g.add("Mul", f"{name}.{label}", a, b)

        parts = [
            g.add("Sub", f"{name}.left", times("fc", first, cos), times("ss", second, sin)),
            g.add("Add", f"{name}.right", times("sc", second, cos), times("fs", first, sin)),
        ]
        if dims < self.shape.head_dim:
            parts.append(self._slice(f"{name}.rest", x, dims, self.shape.head_dim))
        return g.add("Concat", f"{name}.rotated", *parts, axis=3)

    def _slice(self, name: str, x: str, first: int, last: int) -> str:
        ends = [self.g.constant(f"at{n}", np.array([n], np.int64)) for n in (first, last, 3)]
        return self.g.add("Slice", name, x, *ends)

    def _reshape(self, name: str, x: str, *shape: int) -> str:
        sizes = self.g.constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))
        return self.g.add("Reshape", name, x, sizes)
