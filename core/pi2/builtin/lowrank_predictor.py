"""A trained predictor: two small layers an FFN, from the file ``predictors.safetensors`` of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi2.api import Backend, ModelView, Predictor, Probe
from pi2.container.predictors import FfnPredictor, Predictors, model_predictors
from pi2.errors import OptionError
from pi2.tensor import F32, Ids

MAX_LOSS = 0.01
"""How much perplexity a lossy predictor may cost unasked: a share, as its training measured it."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A predictor on the backend, and the bound (neurons,) that a score must exceed."""

    fc1: Any
    fc1_bias: F32
    fc2: Any
    bound: F32


class LowRankPredictor(Predictor):
    """Names neuron i iff ``(fc2 @ relu(fc1 @ x + b1) + b2)[i] > threshold`` (PowerInfer §5.1).

    Both products are the backend's.  Lossy: active neurons that it does not name are missed.  It refuses
    predictors that lost more than ``max_loss`` of perplexity when they were trained (a share: 0.01 is 1 %).
    ``shift`` is added to every threshold: below zero names more.  ``file`` takes the predictors from there
    instead of from the model.  Layers without a predictor get all their neurons.
    """

    name = "lowrank"
    lossless = False

    def __init__(self, shift: float = 0.0, max_loss: float = MAX_LOSS, file: str | None = None) -> None:
        if not np.isfinite(shift):
            raise OptionError(f"shift is {shift}, but is added to thresholds", hint="-1 names more, 1 fewer")
        if not max_loss >= 0:  # not a NaN either
            raise OptionError(f"max_loss is {max_loss}, but is a share", hint="0.01 allows 1 %")
        self._shift, self._max_loss = np.float32(shift), max_loss
        self._file = None if file is None else Path(file).expanduser()
        self._backend: Backend | None = None
        self._placed: dict[int, _Placed] = {}
        self._about = ""

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "two trained layers an FFN, lossy; needs pi2 train-predictor")

    def describe(self) -> str:
        return f"lowrank{self._about}" + (f", thresholds {self._shift:+g}" if self._shift else "")

    def attach(self, model: ModelView, backend: Backend) -> None:
        found = model_predictors(model.path, model.architecture, self._file)
        self._check_loss(found)
        self._backend, self._neurons = backend, model.architecture.n_neurons
        self._placed = {number: self._place(layer) for number, layer in found.layers.items()}
        self._about = _figures(found)

    def predict(self, ffn: int, x: F32) -> Ids | None:
        placed = self._placed.get(ffn)
        if placed is None or self._backend is None:
            return None
        hidden = np.empty((len(x), len(placed.fc1_bias)), np.float32)
        self._backend.linear(placed.fc1, x, hidden)
        hidden += placed.fc1_bias
        np.maximum(hidden, 0, out=hidden)
        scores = np.empty((len(x), self._neurons), np.float32)
        self._backend.linear(placed.fc2, hidden, scores)
        likely = ~(scores <= placed.bound)  # what is not a number is named
        union = likely[0] if len(x) == 1 else likely.any(axis=0)
        return np.flatnonzero(union).astype(np.int32)

    def close(self) -> None:
        for placed in self._placed.values():
            assert self._backend is not None
            self._backend.release(placed.fc1)
            self._backend.release(placed.fc2)
        self._placed = {}

    def _place(self, layer: FfnPredictor) -> _Placed:
        assert self._backend is not None
        bound = np.float32(layer.threshold) + self._shift - layer.fc2_bias
        return _Placed(self._backend.place(layer.fc1), layer.fc1_bias, self._backend.place(layer.fc2), bound)

    def _check_loss(self, found: Predictors) -> None:
        if found.loss is not None and found.loss > self._max_loss:
            enough = math.ceil(found.loss * 1e4) / 1e4
            raise OptionError(
                f"these predictors lost {found.loss:.2%} of perplexity in training,"
                f" more than the {self._max_loss:.2%} allowed",
                hint=f"train with a higher --recall, or allow it: --predictor lowrank:max_loss={enough:g}",
            )


def _figures(found: Predictors) -> str:
    """Widths, bytes, and what was measured in training, for people."""
    widths = [layer.width for layer in found.layers.values()]
    if not widths:
        return ", no layer has a predictor"
    text = f", width {min(widths)} to {max(widths)}, {found.nbytes / 1e6:.1f} MB"
    measured = [layer.measured for layer in found.layers.values() if layer.measured]
    if measured:
        active = sum(m.density for m in measured)
        recall = sum(m.recall * m.density for m in measured) / active if active else 1.0
        named = sum(m.predicted_density for m in measured) / len(measured)
        text += f", measured recall {recall:.2%} at density {named:.1%} for {active / len(measured):.1%}"
    if found.loss is not None:
        text += f", perplexity {found.loss:+.3%}"
    return text
