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
    """NumPy in float32, which shows ``visit`` what every neuron computes.

    Nothing is kept but views of the stored weights: each call decodes one matrix at a time, so give many
    tokens at once.  Float32, since the rounding of quantised activations moves a model's predictions
    about as much as leaving out half of a layer's smallest neurons does.
    """

    name = "probed"

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self._placed = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(0, "shows what neurons compute; not to be chosen")

    def place(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, weight: Tensor, x: F32, out: F32, rows: Ids | None = None) -> None:
        np.matmul(x, weight.to_f32(rows).T, out=out)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        self._placed += 1  # FFNs are placed in their order
        return self._placed - 1, bundles, spec

    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        number, bundles, spec = ffn
        gate, other = factors(bundles, spec, x)
        h = self.visit(number, gate, other, gate * other)
        np.matmul(h, spec.geometry.unpack_segment(bundles, "down"), out=out)
        return int(np.count_nonzero(h))


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
