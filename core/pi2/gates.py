"""Segments of an FFN, above all its gates, as matrices of their own; which neurons gates may let through."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, ModelView
from pi2.tensor import F32, DType, Tensor

_ROUNDING = 2.0**-24  # float32, to nearest
_DECODED = 512  # rows at a time


def segment_matrix(model: ModelView, ffn: int, segment: str) -> Tensor:
    """One segment of all bundles of an FFN ("gate", "up", "down") as a matrix of its own, (neurons, d)."""
    g = model.geometry
    offset, size = g.segments()[segment]
    dtype: DType = getattr(g, segment)
    return Tensor(np.ascontiguousarray(model.bundles(ffn)[:, offset : offset + size]), dtype, g.d_model)


def segment_bias(model: ModelView, ffn: int, segment: str) -> F32:
    """The bias of a gate or up segment, (neurons,); (1,) of zero in models without."""
    if not model.geometry.biased:
        return np.zeros(1, np.float32)
    bias = model.geometry.unpack_segment(model.bundles(ffn), "bias")
    return np.ascontiguousarray(bias[:, 0 if segment == "gate" else -1])


def gate_matrix(model: ModelView, ffn: int) -> Tensor:
    """The gate of an FFN, or what stands for it where there is none, (neurons, d)."""
    return segment_matrix(model, ffn, _gate(model))


def gate_bias(model: ModelView, ffn: int) -> F32:
    """The bias beside ``gate_matrix``, (neurons,), or one 0."""
    return segment_bias(model, ffn, _gate(model))


def _gate(model: ModelView) -> str:
    return "up" if model.geometry.gate is None else "gate"


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
