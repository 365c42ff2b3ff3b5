"""The gates of an FFN as a matrix of its own, and which neurons they may let through."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, ModelView
from pi2.tensor import F32, Tensor

_ROUNDING = 2.0**-24  # float32, to nearest
_DECODED = 512  # rows at a time


def gate_matrix(model: ModelView, ffn: int) -> Tensor:
    """The gate of an FFN, or what stands for it where there is none, (neurons, d)."""
    g = model.geometry
    name, dtype = ("up", g.up) if g.gate is None else ("gate", g.gate)
    offset, size = g.segments()[name]
    return Tensor(np.ascontiguousarray(model.bundles(ffn)[:, offset : offset + size]), dtype, g.d_model)


def gate_bias(model: ModelView, ffn: int) -> F32:
    """The bias beside ``gate_matrix``, (neurons,), or one 0."""
    if not model.geometry.biased:
        return np.zeros(1, np.float32)
    return model.geometry.unpack_segment(model.bundles(ffn), "bias")[:, 0]  # the gate's, or the only one


def row_norms(matrix: Tensor) -> F32:
    """Euclidean length of every row, (rows,)."""
    norms = np.empty(matrix.rows, np.float32)
    for at in range(0, matrix.rows, _DECODED):
        rows = matrix.to_f32(slice(at, at + _DECODED))
        norms[at : at + _DECODED] = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    return norms


def rounding(x: F32, norms: F32, bias: F32 | float = 0.0) -> F32:
    """(n, rows): by how much two float32 dots of rows of these ``norms`` and x (n, d) may differ.

    Both are sums of the same terms, in any order: each is within d roundings of the sum of their sizes,
    which is at most the product of the lengths (Higham, Accuracy and Stability, §3.1).  Twice that, since
    the arithmetic in int8 has lengths that are rounded themselves.
    """
    d = x.shape[1]
    with np.errstate(all="ignore"):  # of what is not finite, neither is the margin
        lengths = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1, keepdims=True)).astype(np.float32)
        margin: F32 = np.float32(4 * (d + 2) * _ROUNDING) * (lengths * norms + np.abs(bias))
    return margin


def maybe_active(backend: Backend, gates: Tensor, x: F32) -> NDArray[np.bool_]:
    """(rows,): False where a gate without bias is surely not above zero for the one token x (1, d)."""
    values = np.empty((1, gates.rows), np.float32)
    placed = backend.place(gates)
    try:
        backend.linear(placed, x, values)
    finally:
        backend.release(placed)
    maybe: NDArray[np.bool_] = ~(values <= -rounding(x, row_norms(gates)))[0]  # a NaN may be anything
    return maybe
