"""A predictor without training: the next layer's gate, asked one layer early."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi2.api import Backend, ModelView, Predictor, Probe
from pi2.errors import OptionError
from pi2.gates import gate_bias, gate_matrix
from pi2.residual import FfnInputs
from pi2.tensor import F32, Ids


class LookaheadPredictor(Predictor):
    """Asks the gates of FFN l + 1 with the input of FFN l (``FfnInputs``).

    Lossy: what attention and FFN add in between is not seen.  Neurons are named whose gate lies above
    ``-margin`` standard deviations of all gates of the FFN: more margin, more recall, less to skip.  The
    first FFN is never guessed.  Calls come layer after layer, as in decoding; an FFN without a call for
    the one before it gets all neurons.
    """

    name = "lookahead"
    lossless = False

    def __init__(self, margin: float = 1.0) -> None:
        if not margin >= 0:  # not a NaN either
            raise OptionError(f"margin is {margin}, but counts standard deviations", hint="0 or more")
        self._margin = margin
        self._gates: dict[int, Any] = {}

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "the next layer's gate on this layer's input, without training, lossy")

    def describe(self) -> str:
        return f"lookahead, margin {self._margin:g} standard deviations"

    def attach(self, model: ModelView, backend: Backend) -> None:
        arch = model.architecture
        self._arch, self._backend = arch, backend
        self._ahead: dict[int, Ids] = {}  # FFN -> guess, made when the one before it was asked
        if not arch.sparse:
            return
        self._gates = {ffn: backend.place(gate_matrix(model, ffn)) for ffn in range(1, arch.n_layers)}
        self._gate_biases = {ffn: gate_bias(model, ffn) for ffn in self._gates}
        self._inputs = FfnInputs(model)

    def predict(self, ffn: int, x: F32) -> Ids | None:
        if not self._arch.sparse:
            return None  # every neuron is active
        if ffn + 1 < self._arch.n_layers:
            self._ahead[ffn + 1] = self._guess(ffn, x)
        return self._ahead.get(ffn)

    def close(self) -> None:
        for handle in self._gates.values():
            self._backend.release(handle)
        self._gates = {}

    def _guess(self, ffn: int, x: F32) -> Ids:
        """Neurons of FFN ``ffn + 1`` from the input (n, d) of FFN ``ffn``."""
        values = np.empty((len(x), self._arch.n_neurons), np.float32)
        self._backend.linear(self._gates[ffn + 1], self._inputs.carry(ffn, x), values)
        values += self._gate_biases[ffn + 1]
        cut = -self._margin * values.std(axis=1, keepdims=True)
        likely = ~(values <= cut)  # what is not a number is named
        return np.flatnonzero(likely.any(axis=0)).astype(np.int32)
