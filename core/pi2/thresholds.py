"""Cuts below which a neuron counts as not active: sparsity for models without exact zeros, without training.

By a rule every neuron gets a score for a token; below its layer's cut it is left out (CATS, arXiv 2404.08763;
TEAL, arXiv 2408.14690, whose places of cutting are the inputs of matrices; here it is the neuron):

    product    |act(gate) * up|               needs gate and up of all neurons, saves down
    gate       |act(gate)| * weight_i         needs the gate of all neurons, saves up and down;
               weight_i = rms(up_i . x) * |down_i|: what the neuron adds to the FFN if its gate is 1
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from pi2.container.safetensors_file import parse_json
from pi2.errors import FormatError, OptionError
from pi2.tensor import F32

Rule = Literal["product", "gate"]
RULES: Final[tuple[Rule, ...]] = get_args(Rule)
_MOST_DENSITIES = 64

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A point of a curve.  Density 1 names all neurons and loses nothing."""

    density: float
    """Share of the neurons that are computed."""
    loss: float
    """By how much the perplexity rose on text that the cuts were not chosen on, as a share."""
    cuts: F32
    """(layers,)"""


@dataclass(slots=True)
class Curve:
    """What one rule costs: cuts for ever smaller densities, and the loss that was measured with each."""

    densities: NDArray[np.float64]
    """(k,), descending within (0, 1)."""
    cuts: F32
    """(k, layers)"""
    losses: NDArray[np.float64]
    """(k,); NaN from the first density on that was not judged yet."""

    @property
    def judged(self) -> int:
        """How many densities have a loss."""
        return int(np.isnan(self.losses).argmax()) if np.isnan(self.losses).any() else len(self.losses)

    def at_density(self, density: float) -> Choice:
        """Between two judged densities cuts and loss are interpolated: loss curves upwards, so it is no less.

        Raises OptionError for a density below all that were judged.
        """
        densities, cuts, losses = self._points()
        if not densities[-1] <= density <= 1:
            raise OptionError(
                f"density {density:g} is not within the {densities[-1]:g} to 1 that were calibrated",
                hint="choose one that is, or name a max_loss instead",
            )
        return self._between(density, densities, cuts, losses)

    def at_loss(self, loss: float) -> Choice:
        """The smallest density that loses at most ``loss``."""
        densities, cuts, losses = self._points()
        last = int(np.flatnonzero(losses <= loss)[-1])
        density = densities[last]
        if last + 1 < len(losses):
            share = (loss - losses[last]) / (losses[last + 1] - losses[last])
            density += share * (densities[last + 1] - density)
        return self._between(float(density), densities, cuts, losses)

    def _points(self) -> tuple[NDArray[np.float64], F32, NDArray[np.float64]]:
        """The judged densities behind density 1; a loss is at least that of every larger density."""
        n = self.judged
        zero = np.zeros((1, self.cuts.shape[1]), np.float32)
        losses = np.maximum.accumulate(np.concatenate(([0.0], self.losses[:n])))
        return np.concatenate(([1.0], self.densities[:n])), np.concatenate((zero, self.cuts[:n])), losses

    @staticmethod
    def _between(
        density: float, densities: NDArray[np.float64], cuts: F32, losses: NDArray[np.float64]
    ) -> Choice:
        rising = densities[::-1]
        at = [np.interp(density, rising, column[::-1]) for column in (losses, *cuts.T)]
        return Choice(density, float(at[0]), np.array(at[1:], np.float32))


@dataclass(slots=True)
class Thresholds:
    """What calibration found for a model."""

    model: str
    """SHA-256 of the model's neurons."""
    weights: F32
    """(layers, neurons), of the rule "gate"."""
    texts: tuple[str, ...]
    """SHA-256 of the texts that cuts and losses come from."""
    tokens: int
    """Tokens that the losses were measured on."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Rule -> its curve."""

    def curve(self, rule: str) -> Curve:
        """Raises OptionError for an unknown rule, FormatError for one that was not calibrated."""
        if rule not in RULES:
            raise OptionError(f"there is no rule {rule!r}", hint=f"rules: {', '.join(RULES)}")
        if rule not in self.curves or not self.curves[rule].judged:
            raise FormatError(f"the rule {rule} was not calibrated", hint=CALIBRATE_HINT)
        return self.curves[rule]

    def to_metadata(self) -> str:
        """All but the arrays, as JSON."""
        curves = {
            rule: {
                "densities": c.densities.tolist(),
                "losses": [None if np.isnan(loss) else loss for loss in c.losses.tolist()],
            }
            for rule, c in self.curves.items()
        }
        return json.dumps({"texts": self.texts, "tokens": self.tokens, "curves": curves})

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in the file."""
        cuts = {f"thresholds.{rule}.cuts": c.cuts for rule, c in self.curves.items()}
        return {"thresholds.weights": self.weights, **cuts}

    @classmethod
    def from_file(cls, model: str, metadata: str, tensors: Tensors) -> Self:
        """Read back, treating both as hostile.  Raises FormatError."""
        raw = parse_json(metadata.encode(), "the thresholds")
        try:
            texts, tokens, curves = raw["texts"], raw["tokens"], raw["curves"]
            points = {rule: (c["densities"], c["losses"]) for rule, c in curves.items()}
        except (KeyError, TypeError, AttributeError):
            raise FormatError("the thresholds are incomplete") from None
        ok = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
        if not ok or type(tokens) is not int or tokens < 1 or not set(points) <= set(RULES):
            raise FormatError("the thresholds are malformed")
        if set(tensors) != {"thresholds.weights", *(f"thresholds.{rule}.cuts" for rule in points)}:
            raise FormatError("the thresholds have a tensor too many or too few")
        weights = _checked("thresholds.weights", tensors["thresholds.weights"])
        found = cls(model, weights, tuple(texts), tokens)
        for rule, (densities, losses) in points.items():
            cuts = _checked(f"thresholds.{rule}.cuts", tensors[f"thresholds.{rule}.cuts"])
            found.curves[rule] = _curve(densities, losses, cuts, len(weights))
        return found


CALIBRATE_HINT: Final = "calibrate: pi2 collect MODEL TEXT --thresholds"


def _checked(name: str, values: NDArray[Any]) -> F32:
    if values.dtype != np.float32 or values.ndim != 2 or not values.size:
        raise FormatError(f"{name} is malformed")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise FormatError(f"{name} has values below zero or beyond reason")
    return values


def _curve(densities: Any, losses: Any, cuts: F32, layers: int) -> Curve:
    for values in (densities, losses):
        if not isinstance(values, list) or len(values) != len(cuts) or len(values) > _MOST_DENSITIES:
            raise FormatError("a curve of the thresholds is malformed")
    if (
        not all(type(d) is float and 0 < d < 1 for d in densities)
        or sorted(set(densities))[::-1] != densities
    ):
        raise FormatError("the densities of the thresholds do not descend from 1 to 0")
    if not all(loss is None or (type(loss) is float and np.isfinite(loss)) for loss in losses):
        raise FormatError("the losses of the thresholds are malformed")
    if cuts.shape[1] != layers or (np.diff(cuts, axis=0) < 0).any():
        raise FormatError("the cuts of the thresholds do not rise as the density falls")
    found = np.array([np.nan if loss is None else loss for loss in losses], np.float64)
    return Curve(np.array(densities, np.float64), cuts, found)
