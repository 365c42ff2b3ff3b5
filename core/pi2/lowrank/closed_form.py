"""The best linear guess of an FFN's gates through few directions, without training.

A gate is linear in its input x, so its sign is guessed well by a product of two thin matrices that is
close to the gate matrix *on the inputs that occur*: the truncated SVD in the metric of their covariance.
The same guess for every width is the first columns of one decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pi2.activations import hidden
from pi2.activity import Active, active_neurons
from pi2.api import FfnSpec, ModelView
from pi2.container.predictors import FfnPredictor, Measured
from pi2.tensor import F32

_SHIFT = 3.0  # standard deviations that keep ReLU of the inner layer out of the way at the start
_PROBIT = 1.7  # a normal distribution function is nearly the logistic function of 1.7 times its argument
_LEAST_RESIDUAL = 0.05  # of a gate's deviation: no guess is taken for surer
_LEAST_VARIANCE = 1e-5  # of the mean variance of the inputs: directions below it hold only noise
_LABELLED_AT_ONCE = 1024  # tokens
_MISS = 10.0  # how much worse it is to miss an active neuron of average size than to name an idle one
_ALIKE = 0.1  # share of that which does not depend on the neuron's size
_SPOILS = 0.05  # of the squared output of an FFN for a token: no single neuron that makes more is missed
_ALWAYS = 1e30  # a bias that no score undoes


@dataclass(frozen=True, slots=True)
class Layers:
    """The weights of a predictor in float32: ``fc2 @ relu(fc1 @ x + b1) + b2`` is the logit of "active"."""

    fc1: F32
    b1: F32
    fc2: F32
    b2: F32

    def scores(self, x: F32) -> F32:
        """(n, d) -> (n, neurons)."""
        hidden = np.maximum(x @ self.fc1.T + self.b1, 0)
        scores: F32 = hidden @ self.fc2.T + self.b2
        return scores


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Directions of the input in the order of what they say of the gates.

    ``directions`` (d, d): on the centred input each gives a value of variance 1, uncorrelated;
    ``loadings`` (neurons, d): what each says of a gate, in deviations of the gate; ``offset`` (neurons,):
    the mean of the gate in its deviations; ``mean`` (d,) of the input.
    """

    directions: F32
    loadings: F32
    offset: F32
    mean: F32

    def layers(self, width: int) -> Layers:
        """The predictor of this width, as logits."""
        fc1, fc2 = self.directions[:width], self.loadings[:, :width]
        residual = np.sqrt(np.maximum(1 - np.square(fc2).sum(axis=1), _LEAST_RESIDUAL**2))
        sure = np.float32(_PROBIT) / residual[:, None]
        fc2 = fc2 * sure
        b1 = np.float32(_SHIFT) - fc1 @ self.mean
        b2 = self.offset * sure[:, 0] - np.float32(_SHIFT) * fc2.sum(axis=1)
        return Layers(fc1.copy(), b1, fc2, b2)


def closed_form(model: ModelView, ffn: int, x: F32, active: Active) -> ClosedForm:
    """For FFN number ``ffn`` and inputs x (n, d), of which ``active`` (n, neurons) tells what they fire."""
    g = model.geometry
    mean = x.mean(axis=0)
    centred = (x - mean).astype(np.float64)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(x))
    deviation = np.sqrt(np.maximum(variance, _LEAST_VARIANCE * max(float(variance.mean()), 1e-30)))
    whole: NDArray[np.float64]
    bundles = model.bundles(ffn)
    if model.architecture.up_relu:  # both factors must be positive: lean on both alike
        gate, _ = _standardised(g.unpack_segment(bundles, "gate"), axes, deviation)
        up, _ = _standardised(g.unpack_segment(bundles, "up"), axes, deviation)
        whole = gate + up
        whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        rate = np.clip(active.mean(axis=0), 1e-3, 1 - 1e-3)
        offset = np.log(rate / (1 - rate)) / _PROBIT
    else:
        rows = g.unpack_segment(bundles, "up" if g.gate is None else "gate")
        whole, size = _standardised(rows, axes, deviation)
        bias = g.unpack_segment(bundles, "bias")[:, 0] if g.biased else 0
        offset = (rows @ mean + bias) / size
    _, turn = np.linalg.eigh(whole.T @ whole)
    turn = turn[:, ::-1]  # the largest first
    directions = turn.T @ (axes / deviation).T
    f32 = np.float32
    return ClosedForm(directions.astype(f32), (whole @ turn).astype(f32), offset.astype(f32), mean)


def _standardised(
    rows: F32, axes: NDArray[np.float64], deviation: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gate rows over the whitened axes, of length 1, and the gates' standard deviations (neurons,)."""
    turned = rows.astype(np.float64) @ axes * deviation
    size = np.maximum(np.linalg.norm(turned, axis=1), 1e-12)
    return turned / size[:, None], size


def labels(model: ModelView, ffn: int, x: F32) -> Active:
    """``active_neurons`` for many tokens with little memory."""
    parts = [
        active_neurons(model, ffn, x[at : at + _LABELLED_AT_ONCE])
        for at in range(0, len(x), _LABELLED_AT_ONCE)
    ]
    return np.concatenate(parts)


class Weigher:
    """How much each active neuron adds to an FFN's output, as the weight of missing it.

    The mean over a token's active neurons is ``_MISS``.  A part is the same for all, so that small terms
    are learnt too.  Decodes the weights of one FFN, and keeps them as float32.
    """

    def __init__(self, model: ModelView, ffn: int) -> None:
        arch = model.architecture
        self._spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
        self._neurons = model.geometry.unpack(model.bundles(ffn))
        self._lengths = np.linalg.norm(self._neurons.down, axis=1)

    def __call__(self, x: F32) -> F32:
        """(n, d) -> (n, neurons), 0 where a neuron is not active."""
        n = self._neurons
        gate = None if n.gate is None else _plus(x @ n.gate.T, n.gate_bias)
        terms = np.abs(hidden(self._spec, gate, _plus(x @ n.up.T, n.up_bias))) * self._lengths
        active = terms > 0
        mean = terms.sum(axis=1, keepdims=True) / np.maximum(active.sum(axis=1, keepdims=True), 1)
        terms /= np.maximum(mean, 1e-30)
        weights: F32 = active * (_MISS * (_ALIKE + (1 - _ALIKE) * terms))
        return weights.astype(np.float32)


def _plus(values: F32, bias: F32 | None) -> F32:
    return values if bias is None else values + bias


def threshold_for(scores: F32, active: Active, recall: float) -> float:
    """The largest threshold that at least ``recall`` of the active scores exceed."""
    hits = scores[active]
    if not len(hits):
        return float(np.nextafter(scores.max(initial=0), np.inf, dtype=np.float32))
    allowed = int((1 - recall) * len(hits))
    lowest_named = np.partition(hits, allowed)[allowed]
    return float(np.nextafter(lowest_named, np.float32(-np.inf)))


def calibrated(
    layer: FfnPredictor, scores: F32, active: Active, weights: F32, recall: float
) -> tuple[FfnPredictor, float]:
    """With the threshold for this recall, and a bias that names neurons always whose miss spoils a token.

    These are few, but a model may lean on one: without the huge output of a first token, which attention
    rests on, all tokens behind it suffer.  ``scores`` and ``weights`` (see ``Weigher``) are of as many tokens
    as ``active`` and maybe of others behind them, which count for that alone.
    Also the share of the squared ``weights`` that is missed of ``active``'s tokens.
    """
    threshold = threshold_for(scores[: len(active)], active, recall)
    always = costly_misses(weights, scores > np.float32(threshold), _SPOILS)
    bias = np.where(always, np.float32(_ALWAYS), layer.fc2_bias)
    named = (scores[: len(active)] > np.float32(threshold)) | always
    hits = float((named & active).sum() / active.sum()) if active.any() else 1.0
    figures = Measured(float(active.mean()), float(named.mean()), hits)
    energy = np.square(weights[: len(active)], dtype=np.float64)
    missed = float(energy[~named].sum() / max(energy.sum(), 1e-30))
    return replace(layer, fc2_bias=bias, threshold=threshold, measured=figures), missed


def density_at(scores: F32, active: Active, recall: float) -> float:
    """Share of the neurons that must be named for this recall."""
    return float(np.mean(scores > np.float32(threshold_for(scores, active, recall))))


def missed_share(scores: F32, weights: F32, density: float) -> float:
    """Share of the squared ``weights`` (n, neurons) that is missed if this share of the neurons is named."""
    flat = scores.reshape(-1)
    named = min(len(flat), max(1, round(density * len(flat))))
    lowest_named = np.partition(flat, len(flat) - named)[len(flat) - named]
    energy = np.square(weights)
    whole = float(energy.sum(dtype=np.float64))
    return float(energy[scores < lowest_named].sum(dtype=np.float64)) / whole if whole else 0.0


def costly_misses(weights: F32, named: Active, share: float) -> NDArray[np.bool_]:
    """(neurons,): those that some token misses and with them more than ``share`` of its squared weights."""
    energy = np.square(weights)
    whole = np.maximum(energy.sum(axis=1, keepdims=True), 1e-30)
    costly: NDArray[np.bool_] = ((energy > share * whole) & ~named).any(axis=0)
    return costly
