"""What a backend must compute, in float64 from the exactly decoded weights, and how far off it may be.

A backend states ``tolerance`` t: the largest error of a result as a share of the sum of the magnitudes
of its terms.  For a dot product that is the bound.  Through an FFN it propagates, per token and neuron:

    g, u    gate and up dot products, sums of magnitudes G and U:  dg = t G,  du = t U
    a       act(g):   da = slope dg + t size,  where slope bounds |act'| within dg of g and size is
            |act(g)| if the function is a polynomial (relu, relu2), else |g|, since the smooth ones are
            computed from terms as large as g that cancel
    h       a u:      dh = |a| du + |u| da + da du + t |a u|
    y       sum of h down:  dy = sum of dh |down| + t sum of (|h| + dh) |down|

dy is a sum over neurons, so the same bound holds for any partition of them.  Results and terms below the
smallest normal float32 may be flushed to zero, which adds at most 2**-126 for each term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi2.api import FfnSpec
from pi2.bundle import Neurons
from pi2.tensor import F32, Ids, Tensor

F64 = NDArray[np.float64]

FLUSH = 2.0**-126
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, slots=True)
class Expected:
    """Values of a linear map, and the error that is allowed for each, both (n, rows)."""

    values: F64
    bound: F64

    def accepts(self, got: F32) -> bool:
        return bool(np.all(np.abs(got.astype(np.float64) - self.values) <= self.bound))


@dataclass(frozen=True, slots=True)
class ExpectedFfn:
    """Output of an FFN and its allowed error, both (n, d); what is known of its activations, (n, k).

    ``active``: h is certainly not zero in any arithmetic within the tolerance.  ``inactive``: certainly zero.
    """

    output: Expected
    active: NDArray[np.bool_]
    inactive: NDArray[np.bool_]

    def accepts_count(self, count: int) -> bool:
        """Whether ``count`` can be the number of (t, i) pairs with h != 0."""
        return int(self.active.sum()) <= count <= int((~self.inactive).sum())


def linear(weight: Tensor, x: F32, rows: Ids | None, tolerance: float) -> Expected:
    """``x @ weight[rows].T`` with the bound above; x (n, cols)."""
    return _dots(weight.to_f32(rows), None, x, tolerance)


def ffn(neurons: Neurons, spec: FfnSpec, x: F32, tolerance: float) -> ExpectedFfn:
    """The sum over ``neurons`` with the bound above; x (n, d)."""
    up = _dots(neurons.up, neurons.up_bias, x, tolerance)
    if neurons.gate is None:
        h, dh = _activate(spec, up, tolerance)
        off = _off(spec.activation in ("relu", "relu2"), up)
    else:
        gate = _dots(neurons.gate, neurons.gate_bias, x, tolerance)
        a, da = _activate(spec, gate, tolerance)
        u, du = (np.maximum(up.values, 0) if spec.up_relu else up.values), up.bound
        h = a * u
        dh = np.abs(a) * du + np.abs(u) * da + da * du + tolerance * np.abs(h) + FLUSH
        off = _off(spec.activation in ("relu", "relu2"), gate) | _off(spec.up_relu, up)
    down = np.abs(neurons.down.astype(np.float64))  # (k, d)
    bound = dh @ down + tolerance * (np.abs(h) + dh) @ down + len(down) * FLUSH
    output = Expected(h @ neurons.down.astype(np.float64), bound)
    # dh may be zero, where both factors are exact; FLUSH keeps what float32 cannot hold undecided
    return ExpectedFfn(output, active=np.abs(h) > dh + 4 * FLUSH, inactive=off)


def _dots(weights: F32, bias: F32 | None, x: F32, tolerance: float) -> Expected:
    w, x64 = weights.astype(np.float64), x.astype(np.float64)
    values, size = x64 @ w.T, np.abs(x64) @ np.abs(w).T
    if bias is not None:
        values, size = values + bias, size + np.abs(bias.astype(np.float64))
    return Expected(values, tolerance * size + np.where(size > 0, w.shape[1] * FLUSH, 0))


def _off(clipped: bool, dots: Expected) -> NDArray[np.bool_]:
    """Where the sum is certainly not positive and what follows makes zero of it; an exact zero does, too."""
    below = dots.values < -dots.bound if clipped else np.zeros(dots.values.shape, bool)
    off: NDArray[np.bool_] = below | ((dots.values == 0) & (dots.bound == 0))
    return off


def _activate(spec: FfnSpec, pre: Expected, tolerance: float) -> tuple[F64, F64]:
    """Value and error bound of the activation function."""
    g, dg = pre.values, pre.bound
    if spec.activation == "relu":
        a = np.maximum(g, 0)
        return a, dg + tolerance * a
    if spec.activation == "relu2":
        a = np.square(np.maximum(g, 0))
        return a, 2 * (np.maximum(g, 0) + dg) * dg + tolerance * a + FLUSH
    if spec.activation == "silu":
        slope = 1.1  # sup |silu'| = 1.0998
        a = g / (1 + np.exp(-np.clip(g, -700, None)))
    elif spec.activation == "gelu_tanh":
        slope = 1.13  # sup |gelu'| = 1.1290, of the tanh form 1.1292
        a = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    else:
        slope = 1.13
        a = 0.5 * g * (1 + _erf(g / math.sqrt(2)))
    return a, slope * dg + tolerance * np.abs(g) + FLUSH
