"""The reference predictor: every neuron may fire, and its own gate decides."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi2.api import Backend, ModelView, Predictor, Probe
from pi2.gates import gate_bias, gate_matrix, rounding, row_norms
from pi2.tensor import F32, Ids, row_bytes


class ExactPredictor(Predictor):
    """Lossless, without training.

    With all weights in memory it names all neurons: the backend computes every gate and then only what is
    not zero.  For a model on flash whose activation has exact zeros it keeps the gates in memory, a third
    of the FFN, and names the neurons whose gate is above zero, or within rounding of it.
    """

    name = "exact"
    lossless = True

    def __init__(self) -> None:
        self._gates: list[Any] = []

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "the gate itself, lossless")

    def describe(self) -> str:
        return "exact, its gates resident" if self._gates else "exact"

    def offloaded_bytes(self, model: ModelView) -> int:
        """Of the gates, as they are stored (powers.SupportsOffload)."""
        arch, g = model.architecture, model.geometry
        row = row_bytes(g.up if g.gate is None else g.gate, g.d_model) + 4
        return arch.n_layers * arch.n_neurons * row if arch.sparse else 0

    def attach_offloaded(self, model: ModelView, backend: Backend) -> None:
        """Keep the gates on the backend (powers.SupportsOffload)."""
        arch = model.architecture
        if not arch.sparse:
            return
        self._backend, self._neurons = backend, arch.n_neurons
        self._norms, self._biases = [], []
        for ffn in range(arch.n_layers):
            gates = gate_matrix(model, ffn)
            self._norms.append(row_norms(gates))
            self._biases.append(gate_bias(model, ffn))
            self._gates.append(backend.place(gates))

    def predict(self, ffn: int, x: F32) -> Ids | None:
        if not self._gates:
            return None
        values = np.empty((len(x), self._neurons), np.float32)
        self._backend.linear(self._gates[ffn], x, values)
        bias = self._biases[ffn]
        surely_off = values + bias <= -rounding(x, self._norms[ffn], bias)
        return np.flatnonzero(~surely_off.all(axis=0)).astype(np.int32)  # what is not a number is named

    def close(self) -> None:
        for handle in self._gates:
            self._backend.release(handle)
        self._gates = []
