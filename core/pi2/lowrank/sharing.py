"""Which layers may miss more active neurons than others: the least harm to the model, for what is saved.

What a layer misses is an error in its output.  The error's energy times a sensitivity of the layer is taken
for the harm, a divergence of the model's predictions from the dense model's, and the harms of all layers for
their sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.lowrank_predictor import PlacedPredictor
from pi2.container.predictors import FfnPredictor
from pi2.decoder import Decoder
from pi2.divergence import Divergence
from pi2.engine import Engine
from pi2.kv_cache import KvCache
from pi2.lowrank.inputs import Corpus
from pi2.probed_backend import ProbedBackend
from pi2.tensor import F32

F64 = NDArray[np.float64]
_PER_HALVING = 2
"""Levels between a recall and another at which half as many are missed."""
_LEAST_NAMED = 1e-9


def recall_levels(lowest: float, highest: float) -> list[float]:
    """Ascending from ``lowest`` on: at each a fixed share of what the one before it misses."""
    found = [lowest]
    step = 0.5 ** (1 / _PER_HALVING)
    while (recall := 1 - (1 - found[-1]) * step) <= highest:
        found.append(recall)
    return found


def share_out(harm: F64, named: F64, most: float) -> NDArray[np.int64]:
    """(layers,): the level of each.  ``harm`` (layers, levels) falls along the levels, ``named`` rises.

    From the first levels on, the layer goes on to its next whose harm falls most for each neuron more that
    is named, until all harm together is at most ``most``, or there is no next.
    """
    layers = np.arange(len(harm))
    at = np.zeros(len(harm), np.int64)
    gains = -np.diff(harm, axis=1) / np.maximum(np.diff(named, axis=1), _LEAST_NAMED)
    gains = np.pad(gains, ((0, 0), (0, 1)), constant_values=-np.inf)  # the last level has no next
    while harm[layers, at].sum() > most:
        best = gains[layers, at].argmax()
        if gains[best, at[best]] == -np.inf:
            break
        at[best] += 1
    return at


class Comparison:
    """A model whose FFNs compute what predictors name, beside the dense model, on sequences of a corpus.

    All tokens of a sequence at once, as in ``pi2.calibrate``, with predictors on the engine's backend.
    """

    def __init__(self, engine: Engine, corpus: Corpus, sequences: NDArray[np.int64]) -> None:
        self._engine, self._sequences = engine, sequences
        self._opening = np.array(corpus.opening, np.int64)
        self._placed: dict[int, PlacedPredictor] = {}
        self._x: F32 = np.empty((0, 0), np.float32)
        self._decoder = Decoder(engine.model, ProbedBackend(self._leave_out), ExactPredictor())
        self._decoder.observer = self._see
        self._divergence = Divergence()
        self._read()

    def nats(self, layers: Mapping[int, FfnPredictor]) -> float:
        """Mean divergence of the predictions from the dense model's, if these layers have predictors."""
        self._placed = {n: PlacedPredictor(self._engine.backend, layer) for n, layer in layers.items()}
        try:
            self._divergence.begin()
            self._read()
        finally:
            for placed in self._placed.values():
                placed.release()
            self._placed = {}
        return self._divergence.nats

    def _read(self) -> None:
        first = max(len(self._opening), 1)
        for ids in self._sequences:
            whole = np.concatenate((self._opening, ids))
            cache = KvCache(self._engine.model.architecture, len(whole))
            logits = self._decoder.forward(whole, cache, all_logits=True)
            self._divergence.add(logits[first - 1 : -1], whole[first:])

    def _see(self, ffn: int, x: F32) -> None:
        self._x = x

    def _leave_out(self, ffn: int, gate: F32, other: F32, h: F32) -> F32:
        placed = self._placed.get(ffn)
        if placed is not None:
            h[placed.scores(self._x) <= placed.bound] = 0
        return h
