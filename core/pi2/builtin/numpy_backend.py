"""The reference backend: NumPy on float32 copies of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi2.activations import activate, hidden
from pi2.api import Backend, FfnSpec, Probe
from pi2.bundle import Neurons
from pi2.tensor import F32, U8, Ids, Tensor


@dataclass(frozen=True, slots=True)
class _PlacedFfn:
    neurons: Neurons
    spec: FfnSpec


@dataclass(frozen=True, slots=True)
class _PlacedSlab:
    bundles: U8
    spec: FfnSpec


class NumpyBackend(Backend):
    """Slow and right.  Keeps everything as float32: 4 bytes a weight, whatever the file holds."""

    name = "numpy"
    tolerance = 2e-6  # float32 sums of up to some 10^4 terms by BLAS, which adds in blocks

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, f"NumPy {np.__version__}, float32")

    def place(self, weight: Tensor) -> F32:
        return weight.to_f32()

    def linear(self, weight: F32, x: F32, out: F32, rows: Ids | None = None) -> None:
        w = weight if rows is None else weight[rows]
        if len(x) == 1:
            np.dot(w, x[0], out=out[0])  # gemv; also for one token of a longer prompt's tail
        else:
            np.matmul(x, w.T, out=out)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> _PlacedFfn:
        return _PlacedFfn(spec.geometry.unpack(bundles), spec)

    def ffn(self, ffn: _PlacedFfn, x: F32, out: F32, rows: Ids | None = None) -> int:
        if len(x) == 1:
            return _one_token(ffn, x[0], out[0], rows)
        n = ffn.neurons if rows is None else ffn.neurons[rows]
        gate = None if n.gate is None else _add(x @ n.gate.T, n.gate_bias)  # (tokens, k)
        h = hidden(ffn.spec, gate, _add(x @ n.up.T, n.up_bias))
        np.matmul(h, n.down, out=out)
        return int(np.count_nonzero(h))

    def place_slab(self, slab: U8, neurons: int, spec: FfnSpec) -> _PlacedSlab:
        return _PlacedSlab(slab, spec)

    def slab_ffn(self, slab: _PlacedSlab, neurons: Ids, slots: Ids, x: F32, out: F32) -> int:
        """Decodes the slots that are asked for, each time anew."""
        return self.ffn(self.place_ffn(slab.bundles[slots], slab.spec), x, out)


def _one_token(ffn: _PlacedFfn, x: F32, out: F32, rows: Ids | None) -> int:
    """Gate first, then only the active rows of up and down: exact, since the others add zero.

    The dots are one BLAS dot per neuron, so a neuron's bits do not depend on which others are asked
    for; the down sum runs over the really active neurons in ascending order.  Hence any superset of
    the active rows gives the same bits.
    """
    n, spec = ffn.neurons, ffn.spec
    if rows is not None:
        n = n[rows]
    if n.gate is None:
        h = activate(spec, _add(np.vecdot(n.up, x), n.up_bias))
        active = np.flatnonzero(h)
        h = h[active]
    else:
        gate = activate(spec, _add(np.vecdot(n.gate, x), n.gate_bias))
        active = np.flatnonzero(gate)
        up_bias = None if n.up_bias is None else n.up_bias[active]
        up = _add(np.vecdot(n.up[active], x), up_bias)
        h = gate[active] * (np.maximum(up, 0) if spec.up_relu else up)
        nonzero = np.flatnonzero(h)
        active, h = active[nonzero], h[nonzero]
    np.dot(h, n.down[active], out=out)
    return len(active)


def _add(x: F32, bias: F32 | None) -> F32:
    return x if bias is None else x + bias
