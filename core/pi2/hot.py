"""Which neurons are hot: the model's own statistics say, or nobody does (PowerInfer-2 §5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pi2.api import Keys
from pi2.container.layout import NEURONS
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import Ids

if TYPE_CHECKING:
    from pi2.container.reader import PiModel


def activations(model: PiModel, notes: list[str]) -> tuple[NDArray[np.int64], int] | None:
    """(layers, neurons): in how many single tokens each was active, and of how many; None if not counted."""
    path = model.path / STATISTICS
    counts = Statistics.load(path, sample=False).counts if path.exists() else None
    if counts is None:
        return None
    arch = model.architecture
    of_this = counts.model == model.manifest.files[NEURONS].sha256
    if not of_this or counts.counts.shape[::2] != (arch.n_layers, arch.n_neurons):
        notes.append(f"{STATISTICS} is of another model: it does not say which neurons are hot")
        return None
    return counts.counts[:, 0], int(counts.steps[0])


def every_so_many(n: int, neurons: int) -> Keys:
    """``n`` of all ``neurons`` of a model, whatever they do."""
    return np.arange(n, dtype=np.int64) * neurons // max(1, n)


def hottest_first(counts: NDArray[np.int64] | None, layers: int, neurons: int) -> list[Ids]:
    """The neurons of every FFN, the most often active first; by id without ``counts``.

    Cut into pieces of equal size this makes clusters of neurons that are about equally hot.
    """
    if counts is None:
        return [np.arange(neurons, dtype=np.int32)] * layers
    return [np.argsort(-each, kind="stable").astype(np.int32) for each in counts]


class HotClusters:
    """Of every FFN the neurons that are hot now: whole clusters, a prefix of ``orders``.

    The last cluster of an FFN may be smaller.
    """

    def __init__(self, orders: list[Ids], cluster: int) -> None:
        self.orders, self.cluster = orders, cluster
        self._counts = [0] * len(orders)
        self._cold = [np.sort(order) for order in orders]
        self._is_hot = np.zeros((len(orders), len(orders[0])), np.bool_)

    def neurons(self, share: float) -> int:
        """How many of an FFN's neurons are hot for a ``share`` from 0 to 1: the nearest whole clusters."""
        every = len(self.orders[0])
        return min(every, round(share * -(-every // self.cluster)) * self.cluster)

    def count(self, ffn: int) -> int:
        """Neurons of FFN number ``ffn`` that are hot."""
        return self._counts[ffn]

    def resize(self, ffn: int, count: int) -> None:
        """From now on the first ``count`` neurons of its order are hot."""
        if count != self._counts[ffn]:
            self._counts[ffn] = count
            self._is_hot[ffn] = False
            self._is_hot[ffn, self.orders[ffn][:count]] = True
            self._cold[ffn] = np.flatnonzero(~self._is_hot[ffn]).astype(np.int32)

    def cold(self, ffn: int, rows: Ids | None) -> Ids | None:
        """Those of ``rows`` (None: of all) that are not hot, ascending; None if that is all neurons."""
        if self._counts[ffn] == 0:
            return rows
        return self._cold[ffn] if rows is None else rows[~self._is_hot[ffn][rows]]
