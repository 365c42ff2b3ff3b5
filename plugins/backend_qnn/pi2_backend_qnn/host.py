"""What static graphs cannot do, in exact float32: single rows, and tokens that are not finite."""

from __future__ import annotations

import numpy as np
from pi2.activations import hidden
from pi2.tensor import F32, Ids

from pi2_backend_qnn.placed import Ffn, Matrix


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
