"""A trained predictor: two small layers an FFN, from the file ``predictors.safetensors`` of the model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, ModelView, Predictor, Probe
from pi2.container.predictors import PREDICTORS, FfnPredictor, Predictors, model_predictors
from pi2.errors import OptionError
from pi2.powers import SupportsLowRank
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import F32, Ids

_RARE = 0.5
"""Of the mean frequency of all neurons: one that fires less often is rare."""
MAX_LOSS = 0.01
"""How much perplexity a lossy predictor may cost unasked: a share, as its training measured it."""


class PlacedPredictor:
    """The predictor of one FFN on a backend."""

    def __init__(self, backend: Backend, layer: FfnPredictor, shift: F32 | None = None) -> None:
        self.bound: F32 = np.float32(layer.threshold) - layer.fc2_bias
        if shift is not None:
            self.bound = self.bound + shift
        """(neurons,): what ``scores`` of a neuron must exceed for it to be named."""
        self._backend, self._bias = backend, layer.fc1_bias
        self._at_once = backend if isinstance(backend, SupportsLowRank) else None
        self.width, self.nbytes, self._neurons = layer.width, layer.nbytes, layer.fc2.rows
        self._fc1, self._fc2 = backend.place(layer.fc1), backend.place(layer.fc2)

    def scores(self, x: F32) -> F32:
        """(n, d) -> (n, neurons), without the outer bias."""
        hidden = np.empty((len(x), self.width), np.float32)
        self._backend.linear(self._fc1, x, hidden)
        hidden += self._bias
        np.maximum(hidden, 0, out=hidden)
        scores = np.empty((len(x), self._neurons), np.float32)
        self._backend.linear(self._fc2, hidden, scores)
        return scores

    def named(self, x: F32) -> tuple[Ids, F32]:
        """Neurons that one token, x (1, d), makes exceed their bounds, and by how much."""
        if self._at_once is not None:
            return self._at_once.low_rank(self._fc1, self._bias, self._fc2, self.bound, x)
        scores = self.scores(x)[0]
        named = np.flatnonzero(~(scores <= self.bound)).astype(np.int32)  # what is not a number is named
        return named, scores[named] - self.bound[named]

    def release(self) -> None:
        """Free what the backend holds."""
        self._backend.release(self._fc1)
        self._backend.release(self._fc2)


class LowRankPredictor(Predictor):
    """Names neuron i iff ``(fc2 @ relu(fc1 @ x + b1) + b2)[i] > threshold`` (PowerInfer §5.1).

    Both products are the backend's.  Lossy: active neurons that it does not name are missed.  It refuses
    predictors that lost more than ``max_loss`` of perplexity when they were trained (a share: 0.01 is 1 %).
    ``shift`` is added to every threshold: below zero names more.  ``rare`` is added to those of neurons that
    fire less than half as often as all do on average, by the model's statistics: of weights on flash, these
    are the ones that have to be read, so a false alarm costs more.  ``file`` takes the predictors from there
    instead of from the model.  Layers without a predictor get all their neurons.
    """

    name = "lowrank"
    lossless = False

    def __init__(
        self, shift: float = 0.0, max_loss: float = MAX_LOSS, file: str | None = None, rare: float = 0.0
    ) -> None:
        for name, value in (("shift", shift), ("rare", rare)):
            if not np.isfinite(value):
                says = f"{name} is {value}, but is added to thresholds"
                raise OptionError(says, hint="-1 names more, 1 fewer")
        if not max_loss >= 0:  # not a NaN either
            raise OptionError(f"max_loss is {max_loss}, but is a share", hint="0.01 allows 1 %")
        self._shift, self._rare, self._max_loss = shift, rare, max_loss
        self._file = None if file is None else Path(file).expanduser()
        self._placed: dict[int, PlacedPredictor] = {}
        self._about = ""

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "two trained layers an FFN, lossy; needs pi2 train-predictor")

    def describe(self) -> str:
        shifts = f", thresholds {self._shift:+g}" if self._shift else ""
        return f"lowrank{self._about}{shifts}" + (f", of rare neurons {self._rare:+g}" if self._rare else "")

    def attach(self, model: ModelView, backend: Backend) -> None:
        found = model_predictors(model.path, model.architecture, self._file)
        self._check_loss(found)
        self.use(found, backend, self._rare_neurons(model, found) if self._rare else None)

    def offloaded_bytes(self, model: ModelView) -> int:
        """Of all predictors (powers.SupportsOffload): they stay in memory."""
        file = self._file or model.path / PREDICTORS
        return file.stat().st_size if file.is_file() else 0  # attach says what is wrong

    def attach_offloaded(self, model: ModelView, backend: Backend) -> None:
        """The same as ``attach`` (powers.SupportsOffload)."""
        self.attach(model, backend)

    def use(self, found: Predictors, backend: Backend, rare: NDArray[np.bool_] | None = None) -> None:
        """Ask these predictors, whatever they lose; ``rare`` (FFNs, neurons) by the model's statistics."""
        self.close()
        for ffn, layer in found.layers.items():
            shift = np.full(layer.fc2.rows, self._shift, np.float32)
            if rare is not None:
                shift[rare[ffn]] += np.float32(self._rare)
            self._placed[ffn] = PlacedPredictor(backend, layer, shift)
        self._about = _figures(found)

    def predict(self, ffn: int, x: F32) -> Ids | None:
        placed = self._placed.get(ffn)
        if placed is None:
            return None
        if len(x) == 1:
            return placed.named(x)[0]
        likely = ~(placed.scores(x) <= placed.bound)  # what is not a number is named
        return np.flatnonzero(likely.any(axis=0)).astype(np.int32)

    def rank(self, ffn: int, x: F32) -> tuple[Ids, F32] | None:
        """How far above their thresholds they are (powers.SupportsConfidence)."""
        placed = self._placed.get(ffn)
        return None if placed is None else placed.named(x)

    def footprint(self, ffn: int) -> tuple[int, int]:
        placed = self._placed.get(ffn)
        return (0, 0) if placed is None else (placed.width, placed.nbytes)

    def close(self) -> None:
        for placed in self._placed.values():
            placed.release()
        self._placed = {}

    def _rare_neurons(self, model: ModelView, found: Predictors) -> NDArray[np.bool_]:
        """(FFNs, neurons).  Raises OptionError, FormatError."""
        counts = Statistics.of_file(model.path / STATISTICS, found.model, sample=False).counts
        if counts is None:
            raise OptionError(
                "which neurons are rare is not known: this model has no statistics",
                hint=f"pi2 collect {model.path} TEXT... counts them",
            )
        active = counts.counts[:, 0]
        is_rare: NDArray[np.bool_] = active < _RARE * active.mean()
        return is_rare

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
