"""A backend that shows what every neuron computes, and computes on with what it is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pi2.activations import activate
from pi2.api import Backend, FfnSpec, Probe
from pi2.tensor import F32, U8, Ids, Tensor

Visit = Callable[[int, F32, F32, F32], F32]
"""(number of the FFN, act(gate), the other factor or 1, their product), all (n, neurons) -> what to keep."""


class ProbedBackend(Backend):
    """Does what ``inner`` does, but FFNs in NumPy, and shows ``visit`` what every neuron computes.

    The weights of an FFN are decoded by each call, one matrix at a time: give many tokens at once.
    """

    name = "probed"

    def __init__(self, inner: Backend, visit: Visit) -> None:
        self._inner, self.visit = inner, visit
        self._placed = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(0, "looks into another backend's work; not to be chosen")

    def place(self, weight: Tensor) -> object:
        return self._inner.place(weight)

    def linear(self, weight: Any, x: F32, out: F32, rows: Ids | None = None) -> None:
        self._inner.linear(weight, x, out, rows)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        self._placed += 1  # FFNs are placed in their order
        return self._placed - 1, bundles, spec

    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        number, bundles, spec = ffn
        gate, other = factors(bundles, spec, x)
        h = self.visit(number, gate, other, gate * other)
        np.matmul(h, spec.geometry.unpack_segment(bundles, "down"), out=out)
        return int(np.count_nonzero(h))

    def release(self, handle: Any) -> None:
        self._inner.release(handle)


def factors(bundles: U8, spec: FfnSpec, x: F32) -> tuple[F32, F32]:
    """The two factors of every neuron, (n, d) -> two (n, neurons): act(gate) and up; act(up) and 1."""
    g = spec.geometry
    up = x @ g.unpack_segment(bundles, "up").T
    bias = g.unpack_segment(bundles, "bias") if g.biased else None
    if bias is not None:
        up += bias[:, -1]
    if g.gate is None:
        return activate(spec, up), np.ones((1, 1), np.float32)
    gate = x @ g.unpack_segment(bundles, "gate").T
    if bias is not None:
        gate += bias[:, 0]
    return activate(spec, gate), np.maximum(up, 0) if spec.up_relu else up
