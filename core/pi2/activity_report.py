"""What statistics of activations say, as plain numbers: density, skew, hot sets, co-activation, overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pi2.activation_counts import ActivationCounts
from pi2.activity import Active
from pi2.errors import FormatError
from pi2.thresholds import Thresholds

HOT: Final = 0.5
"""A neuron is called hot if it is active in so large a share of the steps."""
TOP: Final = 0.2
"""Share of an FFN's neurons that is compared between corpora: the most active ones."""
CURVE: Final = tuple(np.round(np.arange(0, 1.0001, 0.05), 2).tolist())
"""Shares of the neurons at which the cumulative activation is given."""
_ASKED = 1024  # neurons of an FFN whose friends are looked for
_SEEN = 8  # times that a neuron must be active in each half of the sample to be asked

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coactivation:
    """How often neurons of one FFN are active together, estimated from sampled tokens.

    Shares that nothing was seen for are None.
    """

    pair: float | None
    """P(j active | i active), mean over all pairs i != j."""
    friend: float | None
    """The same for j the closest friend of i: the one that is active with it most often.  Friends are chosen
    on one half of the tokens and judged on the other, so that chance alone makes no friends."""
    cold_pair: float | None
    """``pair`` without the hot neurons."""
    cold_friend: float | None
    """``friend`` without the hot neurons (PowerInfer-2 §4.2: below 20 %)."""
    hot: int
    """Neurons that were taken out for it."""


def describe(
    counts: ActivationCounts, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The figures of one corpus, ready for JSON; ``progress`` hears (layers done, layers)."""
    layers = len(counts.counts)
    together = []
    for layer in range(layers):
        together.append(asdict(coactivation(counts, layer)))
        progress(layer + 1, layers)
    repeated, later = counts.repeats.T
    gate, _, both = counts.factors.T
    return {
        "model": counts.model,
        "activity": counts.activity,
        "tokens": counts.tokens,
        "sampled_tokens": counts.sketch.tokens,
        "texts": counts.texts,
        "batches": list(counts.batches),
        "density": _numbers(counts.density),
        "hot_above": HOT,
        "hot_share": _numbers(hot_share(counts)),
        "cumulative_at": list(CURVE),
        "cumulative": _numbers(cumulative(counts)),
        "cumulative_overall": _numbers(cumulative(counts, together=True)[0]),
        "repeated": _numbers(_share(repeated, later)),
        "up_where_gate": _numbers(_share(both, gate)),
        "coactivation": together,
    }


def threshold_costs(found: Thresholds) -> dict[str, list[dict[str, float]]]:
    """Rule -> the densities that were judged, with the share by which each raised the perplexity."""
    return {
        rule: [
            {"density": density, "perplexity_loss": loss}
            for density, loss in zip(c.densities.tolist()[: c.judged], c.losses.tolist(), strict=False)
        ]
        for rule, c in found.curves.items()
    }


def hot_share(counts: ActivationCounts) -> F64:
    """(layers, batch sizes): share of the neurons that are hot (PowerInfer-2 §2.3, Fig. 2)."""
    frequency = counts.frequency
    share: F64 = np.where(np.isnan(frequency[..., 0]), np.nan, (frequency >= HOT).mean(axis=2))
    return share


def cumulative(counts: ActivationCounts, *, together: bool = False) -> F64:
    """(layers, len(CURVE)): share of all activations at batch size 1 that the most active neurons make.

    ``together``: one row, over the neurons of all FFNs.  NaN where nothing was active.
    """
    active = counts.counts[:, 0]
    ordered = -np.sort(-(active.reshape(1, -1) if together else active), axis=1)
    sums = np.concatenate((np.zeros((len(ordered), 1)), ordered.cumsum(axis=1)), axis=1)
    places = np.array(CURVE) * ordered.shape[1]
    rows = [np.interp(places, np.arange(sums.shape[1]), row) for row in sums]
    return np.stack([_share(row, np.full(len(CURVE), row[-1])) for row in rows])


def coactivation(counts: ActivationCounts, layer: int) -> Coactivation:
    """Of one FFN, from the sketch; hot by batch size 1."""
    active = counts.sketch.active(layer)  # (tokens, neurons)
    hot = counts.frequency[layer, 0] >= HOT
    cold = active[:, ~hot]
    return Coactivation(_pair(active), _friend(active), _pair(cold), _friend(cold), int(hot.sum()))


def _pair(active: Active) -> float | None:
    """sum over i of sum over j != i of n(i, j) / n(i), over the pairs: without the matrix of all pairs."""
    times = active.sum(axis=0)
    seen = np.flatnonzero(times)
    if len(seen) == 0 or active.shape[1] < 2:
        return None
    size = active.sum(axis=1)  # active neurons of a token
    others = size @ active[:, seen].astype(np.float64) / times[seen] - 1
    return float(others.mean() / (active.shape[1] - 1))


def _friend(active: Active) -> float | None:
    halves = active[0::2].astype(np.float32), active[1::2].astype(np.float32)
    enough = np.flatnonzero(np.minimum(halves[0].sum(axis=0), halves[1].sum(axis=0)) >= _SEEN)
    if len(enough) == 0 or active.shape[1] < 2:
        return None
    asked = enough[np.linspace(0, len(enough) - 1, min(_ASKED, len(enough))).astype(np.int64)]
    found = []
    for choose, judge in (halves, halves[::-1]):
        together = choose[:, asked].T @ choose  # (asked, neurons)
        together[np.arange(len(asked)), asked] = -1
        friends = together.argmax(axis=1)
        kept = (judge[:, asked] * judge[:, friends]).sum(axis=0) / judge[:, asked].sum(axis=0)
        found.append(kept.mean())
    return float(np.mean(found))


def overlap(a: ActivationCounts, b: ActivationCounts) -> F64:
    """(layers,): share of the ``TOP`` most active neurons of ``a`` that are among those of ``b`` too.

    By chance it would be ``TOP``.  Raises FormatError if they are of different models.
    """
    if a.model != b.model or a.counts.shape[::2] != b.counts.shape[::2]:
        raise FormatError(
            "the statistics are of different models",
            hint="compare corpora on one model",
        )
    top = max(1, round(TOP * a.counts.shape[2]))
    shares = []
    for mine, yours in zip(a.counts[:, 0], b.counts[:, 0], strict=True):
        first, second = (np.argsort(-row, kind="stable")[:top] for row in (mine, yours))
        shares.append(len(np.intersect1d(first, second)) / top)
    return np.array(shares)


def _share(part: NDArray[Any], whole: NDArray[Any]) -> F64:
    shares: F64 = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return shares


def _numbers(values: F64) -> list[Any]:
    """Nested lists, with None for NaN."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [None if np.isnan(v) else float(v) for v in values]
