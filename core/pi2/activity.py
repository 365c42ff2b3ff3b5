"""Which neurons are active for an input: the reference that statistics and predictors are judged by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import ModelView
from pi2.tensor import F32

Active = NDArray[np.bool_]
"""(n, neurons): whether a neuron is active for a token."""


def gate_values(model: ModelView, ffn: int, x: F32, segment: str | None = None) -> F32:
    """What the activation function of each neuron is given: (n, d) -> (n, neurons), float32.

    ``segment`` "up" asks for the other factor of a gated FFN.  The weights are decoded afresh by every
    call, so that the memory stays at one matrix; give many tokens at once.
    """
    g = model.geometry
    segment = segment or ("up" if g.gate is None else "gate")
    bundles = model.bundles(ffn)
    values: F32 = x @ g.unpack_segment(bundles, segment).T
    if g.biased:
        values += g.unpack_segment(bundles, "bias")[:, 0 if segment == "gate" else -1]
    return values


def active_neurons(model: ModelView, ffn: int, x: F32) -> Active:
    """The neurons whose term in the FFN's sum is not zero for a row of ``x`` (n, d), its input.

    By float32 arithmetic in NumPy: a gate within rounding of zero may fall on its other side in a
    backend.  A model whose activation has no exact zeros (SiLU, GELU) has all neurons active.
    """
    if not model.architecture.sparse:
        return np.ones((len(x), model.architecture.n_neurons), np.bool_)
    gate, up = open_factors(model, ffn, x)
    return gate if up is None else gate & up


def open_factors(model: ModelView, ffn: int, x: F32) -> tuple[Active, Active | None]:
    """Where the gate, and where the up side lets something through: a neuron is active if both do.

    For models with exact zeros.  None stands for an up side that has none (all but dReLU).
    """
    gate: Active = gate_values(model, ffn, x) > 0
    return gate, gate_values(model, ffn, x, "up") > 0 if model.architecture.up_relu else None
