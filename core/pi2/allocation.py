"""Histograms of neuron scores, and how a density is shared out among layers.

Leaving out neurons adds an error to a layer's output whose energy is the sum of the squared scores left
out.  Near zero the harm to the model is c_l times that energy, with a sensitivity c_l of each layer.  For
a given density the least harm is done by leaving out the neurons with the smallest c_l * score^2 wherever
they are: what TEAL's greedy steps (arXiv 2408.14690) approach, in closed form.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pi2.tensor import F32

# Scores are counted in bins of 1/64 octave from 2^-64 on, so a cut is within 1.1 % of its quantile.
BINS: Final = 1 << 13
_PER_OCTAVE, _LOWEST = 64, -64
_SPREAD = 2.0**12  # sensitivities beyond so many times the median, or below, are taken for noise

Histograms = NDArray[np.int64]
"""(layers, BINS): how many scores of each layer lie in each bin.  Bin 0 has the zeros."""
F64 = NDArray[np.float64]


def histogram(scores: F32) -> NDArray[np.int64]:
    """Scores of any shape, none negative -> (BINS,)."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(scores.ravel(), dtype=np.float32)
    places = np.nan_to_num((octaves - _LOWEST) * _PER_OCTAVE, nan=BINS, posinf=BINS, neginf=0)
    bins = np.clip(places, 0, BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=BINS)


def _edges(bins: NDArray[np.int64]) -> F32:
    """Lower edges of bins; 0 for bin 0, so that nothing lies below."""
    edges: F32 = np.where(bins > 0, np.exp2(bins / _PER_OCTAVE + _LOWEST), 0).astype(np.float32)
    return edges


def _energies(histograms: Histograms) -> F64:
    """(layers, BINS): energy in each bin."""
    middles = np.exp2((np.arange(BINS) + 0.5) / _PER_OCTAVE + _LOWEST)
    middles[0] = 0
    energies: F64 = histograms.astype(np.float64) * np.square(middles)
    return energies


def energy_cuts(histograms: Histograms, share: float) -> F32:
    """The cut of each layer below which at most ``share`` of its energy lies."""
    below = _energies(histograms).cumsum(axis=1)
    bins = (below <= share * below[:, -1:]).sum(axis=1)
    return _edges(np.where(bins == BINS, 0, bins))  # 0: a layer without energy


def energy_below(histograms: Histograms, cuts: F32) -> F64:
    """(layers,): energy of the scores below each layer's cut, one of this module's."""
    edges = _edges(np.arange(BINS))
    energy: F64 = np.where(edges < cuts[:, None] * (1 - 1e-5), _energies(histograms), 0).sum(axis=1)
    return energy


def uniform_cuts(histograms: Histograms, share: float) -> F32:
    """(layers,): in every layer the cut that at most ``share`` of its scores lie below."""
    below = histograms.cumsum(axis=1)
    return _edges((below <= share * below[:, -1:]).sum(axis=1))


def greedy_cuts(histograms: Histograms, sensitivity: F64, share: float) -> F32:
    """(layers,): cuts below which at most ``share`` of all scores lie, those that do the least harm."""
    shifts = np.rint(0.5 * np.log2(sensitivity) * _PER_OCTAVE).astype(np.int64)
    shifts = np.clip(shifts - int(np.median(shifts)), -BINS, BINS)
    pooled = np.zeros(3 * BINS, np.int64)  # bins of sqrt(c) * score
    for row, shift in zip(histograms, shifts, strict=True):
        pooled[0] += row[0]
        pooled[BINS + shift + 1 : 2 * BINS + shift] += row[1:]
    below = pooled.cumsum()
    edge = int((below <= share * below[-1]).sum())
    return _edges(np.clip(edge - BINS - shifts, 0, BINS) if edge else np.zeros_like(shifts))


def bounded(sensitivity: F64) -> F64:
    """Sensitivities without the impossible: what was not measured gets the median of the others."""
    known = sensitivity[np.isfinite(sensitivity) & (sensitivity > 0)]
    if not len(known):
        return np.ones_like(sensitivity)
    median = float(np.median(known))
    filled = np.where(np.isfinite(sensitivity) & (sensitivity > 0), sensitivity, median)
    bound: F64 = np.clip(filled, median / _SPREAD, median * _SPREAD)
    return bound
