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
from pi2_backend_qnn.scaling import MOST, RELU

_IR_VERSION = 10
_SMOOTH_ENDS = (10.0, 20.0)
"""Beyond, the normal distribution, or the sigmoid, is 0 or 1 as far as fp16 can tell."""
SMOOTH = ("silu", "gelu", "gelu_tanh")


class Graph:
    """Nodes and constants under names that are the same in every graph of the same weights."""

    opset = 18

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

    def axis(self, number: int = 2) -> str:
        return self.constant(f"axis{number}", np.array([number], np.int64))

    def concat(self, name: str, parts: Sequence[str]) -> str:
        return self.add("Concat", name, *parts, axis=2) if len(parts) > 1 else parts[0]

    def split(self, name: str, x: str, parts: int) -> list[str]:
        """(1, parts, n) -> so many times (1, 1, n)."""
        if parts == 1:
            return [x]
        names = [f"{name}{number}" for number in range(parts)]
        self._nodes.append(
            helper.make_node("Split", [x], names, name=f"{name}.Split", axis=1, num_outputs=parts)
        )
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
        return self.concat(at, columns)

    def lifted(self, name: str, parts: Sequence[str], power: int, lifts: list[str]) -> list[str]:
        """``parts`` (1, M, n), less than 2**16, times a power of two for each token, which ``lifts`` gets,
        (1, M, 1).  It makes the largest of all parts less than 2**power, and at least half, if 2**MOST can.

        No quotient: its bits can change with M (QAIRT 2.51).
        """
        size = self.largest(name, [self.add("Abs", f"{part}.abs", part) for part in parts])
        tops = np.arange(MOST + 1, power - MOST - 1, -1)
        ends = np.minimum(np.ldexp(1.0, tops), np.finfo(np.float16).max)
        lifts.append(self.chosen(name, size, ends, np.ldexp(1.0, power - tops)))
        return [self.add("Mul", f"{part}.lifted", part, lifts[-1]) for part in parts]

    def chosen(self, name: str, size: str, ends: NDArray[Any], factors: NDArray[Any]) -> str:
        """For each ``size`` (1, M, 1) the largest of the ``factors`` whose end is above it."""
        values = self.constant(f"{name}.factors", factors[None, None].astype(np.float32))
        fitting = self.add("Mul", f"{name}.fitting", self.below(name, size, ends), values)
        return self.largest(f"{name}.factor", [fitting])

    def below(self, name: str, size: str, ends: NDArray[Any]) -> str:
        """1 for each of the ``ends`` (k,) that ``size`` (1, M, 1) is below, else 0: (1, M, k)."""
        above = self.constant(f"{name}.ends", ends[None, None].astype(np.float32))
        gap = self.add("Relu", f"{name}.gap", self.add("Sub", f"{name}.left", above, size))
        return self.add("Sign", f"{name}.below", gap)

    def largest(self, name: str, parts: Sequence[str]) -> str:
        """Of all ``parts`` (1, M, n): (1, M, 1)."""
        found, *more = [
            self.add("ReduceMax", f"{part}.most", part, self.axis(), keepdims=1) for part in parts
        ]
        for number, each in enumerate(more, 1):
            found = self.add("Max", f"{name}{number}", found, each)
        return found

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
    (1, M, 1) is 1 under the same scale, for biases.  The last output is what hidden values were
    multiplied with, (1, M, 1 or 2).
    """
    rows = g.rows
    x = g.input("x", 1, rows, spec.geometry.d_model)
    if spec.activation in SMOOTH:
        g.input("true", 1, rows, 1)
    if spec.geometry.biased:
        g.input("ones", 1, rows, 1)
    clusters = [
        _Cluster(g, number, bundles[first : first + cluster], spec, exponents)
        for number, first in enumerate(range(0, len(bundles), cluster))
    ]
    lifts: list[str] = []
    factors = [c.factors(x) for c in clusters]
    if spec.activation == "relu2" and spec.geometry.gate is not None:
        firsts = g.lifted("relu", [first for first, _ in factors], RELU, lifts)
        factors = [(first, up) for first, (_, up) in zip(firsts, factors, strict=True)]
    hidden = [c.hidden(*each) for c, each in zip(clusters, factors, strict=True)]
    hidden = g.lifted("hidden", hidden, exponents["hidden"], lifts)
    y, *sums = [c.down(h) for c, h in zip(clusters, hidden, strict=True)]
    for number, each in enumerate(sums, 1):
        y = g.add("Add", f"sum{number}", y, each)
    active = g.concat("active", [c.count for c in clusters])
    found = {y: (1, rows, spec.geometry.d_model), active: (1, rows, len(clusters))}
    found[g.concat("lifts", lifts)] = (1, rows, len(lifts))
    return g.model(found)


class _Cluster:
    """The part of a graph that computes one cluster."""

    def __init__(
        self, g: Graph, number: int, bundles: U8, spec: FfnSpec, exponents: Mapping[str, Any]
    ) -> None:
        self.g, self.at, self.spec, self.exponents = g, f"c{number}", spec, exponents
        self.n = -(-len(bundles) // BLOCK) * BLOCK
        self.bundles = np.zeros((self.n, bundles.shape[1]), np.uint8)
        self.bundles[: len(bundles)] = bundles
        self.mask = g.input(f"mask{number}", 1, 1, self.n)
        self.count = ""
        """Of active neurons, (1, M, 1), once there are factors."""

    def factors(self, x: str) -> tuple[str, str | None]:
        """What hidden values are made of: the activation, not squared yet, and "up" if there is a gate."""
        g, at, gated = self.g, self.at, self.spec.geometry.gate is not None
        biases = self._biases()
        up = self._dots(x, "up", biases[-1])
        if gated and self.spec.up_relu:
            up = g.add("Relu", f"{at}.up.relu", up)
        first, share = self._activated(self._dots(x, "gate", biases[0]) if gated else up)
        first = g.add("Mul", f"{at}.masked", first, self.mask)
        on = self._is_on(first)
        if gated:
            on = g.add("Mul", f"{at}.on", on, self._is_on(up))
        self.count = g.add("ReduceSum", f"{at}.count", on, g.axis(), keepdims=1)
        if share is not None:
            first = g.add("Mul", f"{at}.act", first, share)
        return first, up if gated else None

    def hidden(self, first: str, up: str | None) -> str:
        """Of factors: (1, M, n)."""
        g, at = self.g, self.at
        if self.spec.activation == "relu2":
            first = g.add("Mul", f"{at}.squared", first, first)
        return first if up is None else g.add("Mul", f"{at}.h", first, up)

    def down(self, h: str) -> str:
        """The cluster's sum, (1, M, d)."""
        return self.g.down(f"{self.at}.down", h, self.mask, *self._segment("down"), self.exponents["down"])

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
        """Two factors whose product is the activation function of ``pre``, not squared yet; None is 1.

        A sigmoid's argument has ends, too: without, QNN makes one operation of it and the product before it
        in some graphs of many tokens, which have other bits then (QAIRT 2.51).
        """
        g, at = self.g, self.at
        if self.spec.activation in ("relu", "relu2"):
            return g.add("Relu", f"{at}.relu", pre), None
        true = g.add("Mul", f"{at}.true", pre, "true")
        end = _SMOOTH_ENDS[self.spec.activation == "silu"]
        ends = [g.constant(f"end{each}", np.array(each, np.float32)) for each in (-end, end)]
        v = g.add("Clip", f"{at}.v", true, *ends)
        if self.spec.activation == "silu":
            return pre, g.add("Sigmoid", f"{at}.share", v)
        square = g.add("Mul", f"{at}.v2", v, v)
        slope = g.add("Mul", f"{at}.slope", square, g.scalar(0.044715 * 0.7978845608))
        slope = g.add("Add", f"{at}.slope1", slope, g.scalar(0.7978845608))
        tanh = g.add("Tanh", f"{at}.tanh", g.add("Mul", f"{at}.inner", v, slope))
        half = g.add("Mul", f"{at}.half", tanh, g.scalar(0.5))
        return pre, g.add("Add", f"{at}.share", half, g.scalar(0.5))

    def _is_on(self, factor: str) -> str:
        g = self.g
        return g.add("Sign", f"{factor}.on", g.add("Abs", f"{factor}.size", factor))
