"""What static graphs cannot do, in exact float32: single rows, and tokens that are not finite.

And what graphs with rounded weights ought to find, to judge them by.
"""

from __future__ import annotations

import numpy as np
from pi2.activations import hidden
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.tensor import BLOCK, F32, DType, Ids

from pi2_backend_qnn.placed import Ffn, Matrix
from pi2_backend_qnn.requantise import BITS, rounded


def linear(matrix: Matrix, x: F32, rows: Ids | None) -> F32:
    """``x`` (n, cols) times all rows of the matrix, or some of them: (n, rows)."""
    with np.errstate(all="ignore"):
        y: F32 = x @ matrix.weight.to_f32(rows).T
    return y


def ffn(placed: Ffn, x: F32, rows: Ids | None) -> tuple[F32, int]:
    """The FFN's output (n, d), and the number of its (token, neuron) pairs that are not zero."""
    bundles = placed.bundles if rows is None else placed.bundles[rows]
    n = placed.spec.geometry.unpack(bundles)
    with np.errstate(all="ignore"):
        gate = None if n.gate is None else _dots(n.gate, n.gate_bias, x)
        h = hidden(placed.spec, gate, _dots(n.up, n.up_bias, x))
        return h @ n.down, int(np.count_nonzero(h))


def _dots(weights: F32, bias: F32 | None, x: F32) -> F32:
    y: F32 = x @ weights.T
    return y if bias is None else y + bias


def rounded_ffn(placed: Ffn) -> Ffn:
    """The FFN that a graph computes whose ``placed.weights`` are rounded, in float32 and exact."""
    spec, bits = placed.spec, BITS[placed.weights]
    gate: DType | None = None if spec.geometry.gate is None else "f32"
    geometry = BundleGeometry(spec.geometry.d_model, gate, "f32", "f32", biased=spec.geometry.biased)
    bundles = np.zeros((placed.neurons, geometry.stride), np.uint8)
    for first in range(0, placed.neurons, placed.cluster):
        some = placed.bundles[first : first + placed.cluster]
        for part in geometry.segments():
            values = spec.geometry.unpack_segment(some, part)
            if part == "down":
                values = rounded(np.pad(values, ((0, -len(some) % BLOCK), (0, 0))).T, bits).T[: len(some)]
            elif part != "bias":
                values = rounded(values, bits)
            geometry.pack_into(bundles[first : first + placed.cluster], part, values)
    return Ffn(bundles=bundles, spec=FfnSpec(geometry, spec.activation, spec.up_relu), cluster=placed.cluster)
