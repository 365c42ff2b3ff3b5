"""Names the neurons whose score lies above calibrated cuts: sparsity without training, for SiLU and GELU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi2.activations import activate
from pi2.api import Backend, FfnSpec, ModelView, Predictor, Probe
from pi2.builtin.lowrank_predictor import MAX_LOSS
from pi2.container.layout import NEURONS
from pi2.container.manifest import read_manifest
from pi2.errors import FormatError, OptionError
from pi2.gates import gate_bias, gate_matrix, segment_bias, segment_matrix
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import F32, Ids
from pi2.thresholds import CALIBRATE_HINT, Choice, Thresholds


@dataclass(frozen=True, slots=True)
class _Placed:
    """What the score of an FFN is computed from; ``other`` is None for the rule "gate"."""

    gate: Any
    gate_bias: F32
    other: Any
    other_bias: F32
    bound: F32
    """(1,) or (neurons,): what |act(gate)|, or the product, must reach."""


class ThresholdPredictor(Predictor):
    """Leaves out neurons whose score is below their layer's cut (CATS, TEAL; see ``pi2.thresholds``).

    Lossy.  Cuts and what they cost come from ``pi2 collect --thresholds``.  Without a ``density`` it is the
    smallest that loses at most ``max_loss`` of perplexity (a share: 0.01 is 1 %); a ``density`` that lost
    more is refused.  ``rule`` "product" computes gate and up of all neurons first, and loses least; "gate"
    computes only the gates.
    """

    name = "threshold"
    lossless = False

    def __init__(
        self, density: float | None = None, max_loss: float = MAX_LOSS, rule: str = "product"
    ) -> None:
        if density is not None and not 0 < density <= 1:
            raise OptionError(f"density is {density}, but is a share of the neurons", hint="for example 0.7")
        if not max_loss >= 0:  # not a NaN either
            raise OptionError(f"max_loss is {max_loss}, but is a share", hint="0.01 allows 1 %")
        self._density, self._max_loss, self._rule = density, max_loss, rule
        self._backend: Backend | None = None
        self._placed: list[_Placed] = []
        self._about = ""

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "cuts on magnitudes, for SiLU and GELU, lossy; needs pi2 collect --thresholds")

    def describe(self) -> str:
        return f"threshold{self._about}"

    def attach(self, model: ModelView, backend: Backend) -> None:
        found = model_thresholds(model)
        choice = self._choose(found)
        arch = model.architecture
        self._spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
        self._backend, self._neurons, self._read = backend, arch.n_neurons, self._bytes(model)
        self._placed = []
        if choice.density < 1:
            self._placed = [self._place(model, ffn, choice, found) for ffn in range(arch.n_layers)]
        self._about = (
            f" by {self._rule}, density {choice.density:.1%}, perplexity {choice.loss:+.2%}"
            f" as measured on {found.tokens} tokens"
        )

    def offloaded_bytes(self, model: ModelView) -> int:
        """Of gates, and ups by the rule "product" (powers.SupportsOffload): they stay in memory."""
        return model.architecture.n_layers * self._bytes(model)

    def attach_offloaded(self, model: ModelView, backend: Backend) -> None:
        """The same as ``attach`` (powers.SupportsOffload)."""
        self.attach(model, backend)

    def footprint(self, ffn: int) -> tuple[int, int]:
        """No inner layer, and the bytes of the gates and ups that are asked (powers.SupportsFootprint)."""
        return 0, self._read if self._placed else 0

    def _asks_up(self, model: ModelView) -> bool:
        return self._rule == "product" and model.geometry.gate is not None

    def _bytes(self, model: ModelView) -> int:
        sizes = {name: size for name, (_, size) in model.geometry.segments().items()}
        asked = sizes["up"] if model.geometry.gate is None else sizes["gate"]
        return model.architecture.n_neurons * (asked + (sizes["up"] if self._asks_up(model) else 0))

    def predict(self, ffn: int, x: F32) -> Ids | None:
        if not self._placed:
            return None
        placed = self._placed[ffn]
        scores = self._values(placed.gate, placed.gate_bias, x)
        scores = activate(self._spec, scores)
        if placed.other is not None:
            other = self._values(placed.other, placed.other_bias, x)
            scores *= np.maximum(other, 0, out=other) if self._spec.up_relu else other
        named = ~(np.abs(scores) < placed.bound)  # what is not a number is named
        union = named[0] if len(x) == 1 else named.any(axis=0)
        return np.flatnonzero(union).astype(np.int32)

    def close(self) -> None:
        for placed in self._placed:
            assert self._backend is not None
            for handle in (placed.gate, placed.other):
                if handle is not None:
                    self._backend.release(handle)
        self._placed = []

    def _values(self, weight: Any, bias: F32, x: F32) -> F32:
        assert self._backend is not None
        values = np.empty((len(x), self._neurons), np.float32)
        self._backend.linear(weight, x, values)
        values += bias
        return values

    def _choose(self, found: Thresholds) -> Choice:
        curve = found.curve(self._rule)
        if self._density is None:
            return curve.at_loss(self._max_loss)
        choice = curve.at_density(self._density)
        if choice.loss > self._max_loss:
            enough = math.ceil(choice.loss * 1e3) / 1e3
            raise OptionError(
                f"density {choice.density:g} lost {choice.loss:.2%} of perplexity when it was calibrated,"
                f" more than the {self._max_loss:.2%} allowed",
                hint=f"allow it: --predictor threshold:density={choice.density:g},max_loss={enough:g},"
                f"rule={self._rule}; or leave density out",
            )
        return choice

    def _place(self, model: ModelView, ffn: int, choice: Choice, found: Thresholds) -> _Placed:
        assert self._backend is not None
        bound = choice.cuts[ffn : ffn + 1]
        if self._rule == "gate":  # |act| * weight >= cut; a neuron without weight is never worth it
            weights = found.weights[ffn]
            bound = np.divide(bound, weights, out=np.full_like(weights, np.inf), where=weights > 0)
        return _Placed(
            self._backend.place(gate_matrix(model, ffn)),
            gate_bias(model, ffn),
            self._backend.place(segment_matrix(model, ffn, "up")) if self._asks_up(model) else None,
            segment_bias(model, ffn, "up"),
            bound,
        )


def model_thresholds(model: ModelView) -> Thresholds:
    """The thresholds in an opened model.  Raises FormatError, with the command that makes them."""
    sha256 = read_manifest(model.path).files[NEURONS].sha256
    found = Statistics.of_file(model.path / STATISTICS, sha256, sample=False).thresholds
    if found is None:
        raise FormatError(f"{model.path}: the model has no thresholds", hint=CALIBRATE_HINT)
    shape = model.architecture.n_layers, model.architecture.n_neurons
    if found.weights.shape != shape:
        raise FormatError(
            f"{model.path / STATISTICS}: its thresholds do not fit the model", hint=CALIBRATE_HINT
        )
    return found
