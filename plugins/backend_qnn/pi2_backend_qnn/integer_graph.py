"""Graphs whose products are of integers: weights by ``pi2_backend_qnn.requantise``, numbers of 16 bits.

What goes into a product is a vector whose 2-norm is at most 1, so that none of its numbers exceeds 1, and
none of the result the largest norm of a row of weights: ranges that are known when a graph is made, without
a text to measure them on, and that nothing can exceed.  Of K numbers that are alike they leave log2(K) / 2
bits unused, of 16.  The host sees to the norms of tokens (``pi2_backend_qnn.norm_scaling``), the graph itself
to those of hidden values, cluster by cluster.  Between products numbers are fp16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pi2.tensor import F32, U8, DType, decode

from pi2_backend_qnn.graph import Graph
from pi2_backend_qnn.requantise import Part, parts_of
from pi2_backend_qnn.scaling import MOST

_MOST = 32767
"""Steps from 0 to the end of a range, either way."""
_DROPPED = 0.009
"""More than what QNN drops of a sum of numbers up to 1: 8 bits of a sum of integers (QAIRT 2.51)."""
_ROUNDED = 1 + 2**-12  # more than what float32 loses


class IntegerGraph(Graph):
    """``bits`` of a weight: 8, or 4 with outliers of 8."""

    opset = 21  # the first with int4

    def __init__(self, rows: int, bits: int) -> None:
        super().__init__(rows)
        self.bits = bits
        self._rounded: dict[str, str] = {}

    def linear(self, name: str, x: str, data: U8, dtype: DType, exponent: int) -> str:
        """As ``Graph.linear``; the 2-norm of a row of ``x`` is at most 1."""
        return self._product(name, x, np.ldexp(decode(data, dtype), -exponent))

    def down(self, at: str, h: str, mask: str, data: U8, dtype: DType, exponent: Any) -> str:
        """As ``Graph.down``, with an exponent for each output.

        Of ``h``, whose numbers are less than 1, it takes two factors out that come last: a power of two that
        leaves the largest at least half, if 2**MOST can, and then one that leaves a 2-norm of at most 1.
        """
        tops = np.arange(0.0, -MOST - 1, -1)[::-1]
        size = self.largest(f"{at}.largest", [self.add("Abs", f"{at}.abs", h)])
        unit, largest = self._taken_out(f"{at}.unit", h, size, np.exp2(tops), np.exp2(tops))
        squares = self.add("Mul", f"{at}.squares", unit, unit)
        wholes = np.exp2(np.arange(-2, math.log2(len(data)) + 0.5, 0.25))  # squares of norms
        size = self._sum(f"{at}.sum", squares, len(data))
        normed, norm = self._taken_out(
            f"{at}.normed", unit, size, wholes * (1 - 2**-9) - _DROPPED, wholes**0.5
        )
        weights = np.ldexp(decode(data, dtype), -np.array(exponent, np.int32))
        y = self._product(f"{at}.y", normed, weights.T)
        return self.add("Mul", at, self.add("Mul", f"{at}.by_norm", y, norm), largest)

    def _taken_out(
        self, name: str, x: str, size: str, ends: NDArray[Any], values: NDArray[Any]
    ) -> tuple[str, str]:
        """``x`` (1, M, n) divided by, and, (1, M, 1), that one of the ``values`` whose end, of the ascending
        ``ends``, is the next above ``size`` (1, M, 1).  No quotient: its bits can change with M (QAIRT 2.51).
        """
        ends, values = np.append(0, ends), np.append(values, values[-1])  # 0 is never above
        below = self.below(name, size, ends)
        inverse = self.constant(
            f"{name}.inverses", np.append(1, 1 / values[:-1])[None, None].astype(np.float32)
        )
        inverse = self.largest(f"{name}.inverse", [self.add("Mul", f"{name}.fitting", below, inverse)])
        value = self.constant(f"{name}.values", values[None, None].astype(np.float32))
        passed = self.add("Sub", f"{name}.passed", self.scalar(1.0), below)
        value = self.largest(f"{name}.value", [self.add("Mul", f"{name}.reached", passed, value)])
        return self.add("Mul", name, x, inverse), value

    def _product(self, name: str, x: str, weights: F32) -> str:
        """``x`` (1, M, K), of norm 1 at most, times ``weights`` (N, K)."""
        if x not in self._rounded:
            self._rounded[x] = self._to_16_bits(f"{x}.16", x, 1.0)
        parts = parts_of(np.ascontiguousarray(weights), self.bits)
        if len(parts) == 1:
            return self._part(name, self._rounded[x], parts[0])
        products = [self._part(f"{name}.part{at}", self._rounded[x], part) for at, part in enumerate(parts)]
        return self.add("Add", name, *products)

    def _sum(self, name: str, x: str, count: int) -> str:
        """Of so many numbers from 0 to 1: (1, M, count) -> (1, M, 1), at most _DROPPED too little.

        A product of integers, since the bits of ReduceSum can change with M (QAIRT 2.51).
        """
        ones = Part(np.ones((1, count), np.int8), np.ones(1, np.float32), 8)
        total = self._part(f"{name}.total", self._to_16_bits(f"{name}.16", x, 1.0), ones, count)
        return self.add("Add", name, total, self.scalar(3 * count / _MOST))

    def _part(self, name: str, x: str, part: Part, reach: float | None = None) -> str:
        """``reach``: what no number of the result exceeds, if ``x`` has no norm of 1."""
        if part.channels is not None:
            places = self.constant(f"{name}.places", part.channels)
            x = self._to_16_bits(f"{name}.x", self.add("Gather", f"{name}.chosen", x, places, axis=2), 1.0)
        quants = self._integers(f"{name}.quants", part.quants.T, part.bits)
        zeros = self._integers(f"{name}.zeros", np.zeros(len(part.scales), np.int8), part.bits)
        scales = self.constant(f"{name}.scales", part.scales)
        weights = self.add("DequantizeLinear", f"{name}.weights", quants, scales, zeros, axis=1)
        y = self.add("MatMul", f"{name}.product", x, weights)
        norm = float(np.linalg.norm(part.to_f32().astype(np.float64), axis=1).max(initial=0))
        added = 0.5 * part.quants.shape[1] ** 0.5 / _MOST  # to the norm of x, when it is rounded
        return self._to_16_bits(name, y, reach or norm * (1 + added) * _ROUNDED or 1.0)

    def _to_16_bits(self, name: str, x: str, reach: float) -> str:
        """``x``, no number of which exceeds ``reach``, in steps of 2**-15 of it."""
        ends = (
            self.constant(f"{name}.step", np.array(reach / _MOST, np.float32)),
            self.constant("middle", np.array(_MOST + 1, np.uint16)),
        )
        return self.add("DequantizeLinear", name, self.add("QuantizeLinear", f"{name}.q", x, *ends), *ends)

    def _integers(self, name: str, values: NDArray[np.int8], bits: int) -> str:
        """QNN takes int4 without zero points as well, and gives nonsense (QAIRT 2.51)."""
        if bits == 8:
            return self.constant(name, values)
        nibbles = np.zeros(-(-values.size // 2) * 2, np.uint8)
        nibbles[: values.size] = values.ravel().view(np.uint8) & 15
        raw = (nibbles[0::2] | nibbles[1::2] << np.uint8(4)).tobytes()
        return self.tensor(helper.make_tensor(name, TensorProto.INT4, values.shape, raw, raw=True))
