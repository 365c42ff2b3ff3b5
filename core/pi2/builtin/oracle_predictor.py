"""The true active set, for bounds: what a perfect predictor would name."""

from __future__ import annotations

import numpy as np

from pi2.activity import active_neurons
from pi2.api import Backend, ModelView, Predictor, Probe
from pi2.tensor import F32, Ids


class OraclePredictor(Predictor):
    """Computes the whole gate in NumPy and names what is active: the best recall and precision there can be.

    An instrument, not a way to go faster.  Called lossy, since a gate within rounding of zero may be
    active in the backend's arithmetic alone.
    """

    name = "oracle"
    lossless = False

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "the true active set by NumPy, for bounds; slower than no predictor")

    def attach(self, model: ModelView, backend: Backend) -> None:
        self._model = model

    def predict(self, ffn: int, x: F32) -> Ids | None:
        if not self._model.architecture.sparse:
            return None
        return np.flatnonzero(active_neurons(self._model, ffn, x).any(axis=0)).astype(np.int32)
