"""Static graphs in ONNX: a matrix product, and an FFN as a sum over clusters.  Runs in the worker.

Shapes: M rows of tokens, d = d_model, n neurons of a cluster (a multiple of 32; what is padded has
weights of zero).  Quantised weights stay as they are: gate and up, whose blocks run along d, are one
MatMulNBits each.  The blocks of ``down`` run along d as well, which is its other side, so that there it
is one MatMulNBits of bare quants for each 32 columns, whose input has been multiplied by the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from pi2.api import FfnSpec
from pi2.tensor import BLOCK, F32, U8, DType, Tensor, decode

from pi2_backend_qnn.pack import BITS, nbits, outputs, quants_of

_IR_VERSION = 10
_SMOOTH_END = 10.0  # beyond, the sigmoid and the normal distribution are 0 or 1 as far as fp16 can tell
SMOOTH = ("silu", "gelu", "gelu_tanh")


class Graph:
    """Nodes and constants under names that are the same in every graph of the same weights."""

    opset = 17

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []

    def input(self, name: str, *shape: int) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def tensor(self, made: Any) -> str:
        """A constant that NumPy has no type for."""
        self._constants[made.name] = made
        return str(made.name)

    def scalar(self, value: float) -> str:
        return self.constant(f"const.{value}", np.array([[[value]]], np.float32))

    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node called ``name``, whose only output has that name, too."""
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=f"{name}.{op}", **attributes))
        return name

    def split(self, name: str, x: str, parts: int) -> list[str]:
        """(1, parts, n) -> so many times (1, 1, n)."""
        if parts == 1:
            return [x]
        names = [f"{name}{number}" for number in range(parts)]
        self._nodes.append(helper.make_node("Split", [x], names, name=f"{name}.Split", axis=1))
        return names

    def nbits(self, name: str, x: str, quants: NDArray[np.int8], scales: F32, bits: int) -> str:
        """``x`` (1, M, K) times quants (N, K) with scales (N, K / 32)."""
        n, k = quants.shape
        weights = self.constant(f"{name}.quants", nbits(quants, bits))
        factors = self.constant(f"{name}.scales", scales.reshape(-1))
        sizes = {"K": k, "N": n, "bits": bits, "block_size": BLOCK}
        return self.add("MatMulNBits", name, x, weights, factors, domain="com.microsoft", **sizes)

    def linear(self, name: str, x: str, data: U8, dtype: DType, exponent: int) -> str:
        """``x`` (1, M, cols) times the rows of ``data`` (n, row_bytes), divided by 2**exponent."""
        if dtype in BITS:
            q = quants_of(data, dtype)
            return self.nbits(name, x, q.quants, np.ldexp(q.scales, -exponent), q.bits)
        values = np.ldexp(decode(data, dtype), -exponent)
        return self.add("MatMul", name, x, self.constant(f"{name}.weight", values.T))

    def unfolded(self, name: str, values: F32, mask: str) -> str:
        """Numbers for each neuron (k, n) -> (1, k, n), 0 for those that are masked.

        The product with the mask keeps QNN from storing a constant as often as a graph has rows, times 8.
        """
        return self.add("Mul", name, self.constant(f"{name}.all", values[None]), mask)

    def down(self, at: str, h: str, mask: str, data: U8, dtype: DType, exponent: Any) -> str:
        """``h`` (1, M, n) times the rows of ``data`` (n, row_bytes), divided by 2**exponent: (1, M, d)."""
        if dtype not in BITS:
            values = np.ldexp(decode(data, dtype), -exponent)
            return self.add("MatMul", at, h, self.constant(f"{at}.weight", values))
        q = quants_of(data, dtype)
        scales = np.ldexp(q.scales, -exponent)
        ones = np.ones((BLOCK, len(data) // BLOCK), np.float32)
        blocks, columns = scales.shape[1], []
        factors = self.split(f"{at}.factors", self.unfolded(f"{at}.scales", scales.T, mask), blocks)
        for block in range(blocks):
            scaled = self.add("Mul", f"{at}{block}.h", h, factors[block])
            quants = q.quants[:, block * BLOCK : (block + 1) * BLOCK].T
            columns.append(self.nbits(f"{at}{block}", scaled, quants, ones, q.bits))
        return columns[0] if len(columns) == 1 else self.add("Concat", at, *columns, axis=2)

    def model(self, outputs: Mapping[str, Sequence[int]]) -> bytes:
        results = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ]
        graph = helper.make_graph(self._nodes, "pi2", self._inputs, results, list(self._constants.values()))
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        serialised: bytes = model.SerializeToString()
        return serialised


def linear_graph(g: Graph, weight: Tensor, exponent: int) -> bytes:
    """x (1, M, cols) -> y (1, M, rows of ``weight``), divided by 2**exponent.

    A single row is followed by one of zeros: MatMulNBits of one row gives nonsense (QAIRT 2.51).
    """
    x = g.input("x", 1, g.rows, weight.cols)
    data = np.zeros((outputs(weight.rows), weight.data.shape[1]), np.uint8)
    data[: weight.rows] = weight.data
    g.linear("y", x, data, weight.dtype, exponent)
    return g.model({"y": (1, g.rows, len(data))})


def ffn_graph(g: Graph, bundles: U8, spec: FfnSpec, cluster: int, exponents: Mapping[str, Any]) -> bytes:
    """x (1, M, d), mask{i} (1, 1, n) -> (1, M, d), active (1, M, clusters): the first clusters of an FFN.

    ``exponents``: of gate, up and down.  Inputs and outputs are scaled as ``pi2_backend_qnn.scaling`` says:
    "true" (1, M, 1) is what makes a gate of it that the activation function can be asked for, "ones"
    (1, M, 1) is 1 under the same scale, for biases.
    """
    rows = g.rows
    x = g.input("x", 1, rows, spec.geometry.d_model)
    if spec.activation in SMOOTH:
        g.input("true", 1, rows, 1)
    if spec.geometry.biased:
        g.input("ones", 1, rows, 1)
    parts = [bundles[first : first + cluster] for first in range(0, len(bundles), cluster)]
    sums, counts = [], []
    for number, part in enumerate(parts):
        y, count = _Cluster(g, f"c{number}", part, spec, exponents).build(x, number)
        sums.append(y)
        counts.append(count)
    y, active = sums[0], counts[0]
    for number, each in enumerate(sums[1:], 1):
        y = g.add("Add", f"sum{number}", y, each)
    if len(counts) > 1:
        active = g.add("Concat", "active", *counts, axis=2)
    return g.model({y: (1, rows, spec.geometry.d_model), active: (1, rows, len(parts))})


class _Cluster:
    """The part of a graph that computes one cluster."""

    def __init__(self, g: Graph, at: str, bundles: U8, spec: FfnSpec, exponents: Mapping[str, Any]) -> None:
        self.g, self.at, self.spec, self.exponents = g, at, spec, exponents
        self.n = -(-len(bundles) // BLOCK) * BLOCK
        self.bundles = np.zeros((self.n, bundles.shape[1]), np.uint8)
        self.bundles[: len(bundles)] = bundles

    def build(self, x: str, number: int) -> tuple[str, str]:
        """Names of this cluster's sum (1, M, d), and of its number of active neurons (1, M, 1)."""
        g, at, gated = self.g, self.at, self.spec.geometry.gate is not None
        self.mask = mask = g.input(f"mask{number}", 1, 1, self.n)
        biases = self._biases()
        up = self._dots(x, "up", biases[-1])
        if gated and self.spec.up_relu:
            up = g.add("Relu", f"{at}.up.relu", up)
        first, second = self._activated(self._dots(x, "gate", biases[0]) if gated else up)
        first = g.add("Mul", f"{at}.masked", first, mask)
        on = self._is_on(first)
        h = first if second is None else g.add("Mul", f"{at}.act", first, second)
        if gated:
            h = g.add("Mul", f"{at}.h", h, up)
            on = g.add("Mul", f"{at}.on", on, self._is_on(up))
        axes = g.constant("axis", np.array([2], np.int64))
        count = g.add("ReduceSum", f"{at}.count", on, axes, keepdims=1)
        return g.down(f"{at}.down", h, mask, *self._segment("down"), self.exponents["down"]), count

    def _segment(self, name: str) -> tuple[U8, DType]:
        offset, size = self.spec.geometry.segments()[name]
        return np.ascontiguousarray(self.bundles[:, offset : offset + size]), getattr(
            self.spec.geometry, name
        )

    def _biases(self) -> list[F32 | None]:
        if not self.spec.geometry.biased:
            return [None]
        return list(self.spec.geometry.unpack_segment(self.bundles, "bias").T)

    def _dots(self, x: str, name: str, bias: F32 | None) -> str:
        g, label = self.g, f"{self.at}.{name}"
        y = g.linear(label, x, *self._segment(name), self.exponents[name])
        if bias is None:
            return y
        scaled = np.ldexp(bias, -self.exponents[name]).astype(np.float32)
        term = g.add("Mul", f"{label}.bias", "ones", g.unfolded(f"{label}.b", scaled[None], self.mask))
        return g.add("Add", f"{label}.biased", y, term)

    def _activated(self, pre: str) -> tuple[str, str | None]:
        """Two factors whose product is the activation function of ``pre``; the second may be 1."""
        g, at = self.g, self.at
        if self.spec.activation in ("relu", "relu2"):
            a = g.add("Relu", f"{at}.relu", pre)
            return a, a if self.spec.activation == "relu2" else None
        true = g.add("Mul", f"{at}.true", pre, "true")
        ends = [g.constant(f"end{end}", np.array(end, np.float32)) for end in (-_SMOOTH_END, _SMOOTH_END)]
        if self.spec.activation == "silu":
            return pre, g.add("Sigmoid", f"{at}.share", true)
        v = g.add("Clip", f"{at}.v", true, *ends)
        square = g.add("Mul", f"{at}.v2", v, v)
        slope = g.add("Mul", f"{at}.slope", square, g.scalar(0.044715 * 0.7978845608))
        slope = g.add("Add", f"{at}.slope1", slope, g.scalar(0.7978845608))
        tanh = g.add("Tanh", f"{at}.tanh", g.add("Mul", f"{at}.inner", v, slope))
        half = g.add("Mul", f"{at}.half", tanh, g.scalar(0.5))
        return pre, g.add("Add", f"{at}.share", half, g.scalar(0.5))

    def _is_on(self, factor: str) -> str:
        g = self.g
        return g.add("Sign", f"{factor}.on", g.add("Abs", f"{factor}.size", factor))
