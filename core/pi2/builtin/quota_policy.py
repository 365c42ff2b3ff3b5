"""Least recently used within every FFN, each with the same share of the cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import KeyTable, grown
from pi2.builtin.lru_policy import RecencyLog


class QuotaPolicy(CachePolicy):
    """The FFN with the most residents gives up its oldest, down to the next largest, and so on.

    So no FFN pushes another one out: each ends up with the same share, or with all that it uses.
    """

    name = "quota"

    def __init__(self) -> None:
        self._orders: dict[int, RecencyLog] = {}
        self._table = KeyTable()
        self._ffn_of = np.zeros(0, np.int64)  # by index

    @classmethod
    def probe(cls) -> Probe:
        return Probe(5, "least recently used, an equal share for every FFN")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._table.index(keys)
        self._ffn_of = grown(self._ffn_of, self._table.size)
        self._ffn_of[at] = ffn
        self._orders.setdefault(ffn, RecencyLog()).use(keys)

    def victims(self, ffn: int, n: int) -> Keys:
        ffns = sorted(self._orders)
        sizes = np.array([self._orders[f].residents for f in ffns], np.int64)
        takes = sizes - _levelled(sizes, n)
        parts = [self._orders[f].oldest(take) for f, take in zip(ffns, takes.tolist(), strict=True) if take]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def evicted(self, keys: Keys) -> None:
        at = self._table.index(keys)
        self._ffn_of = grown(self._ffn_of, self._table.size)
        owners = self._ffn_of[at]
        for ffn in np.unique(owners).tolist():
            if ffn in self._orders:
                self._orders[ffn].forget(keys[owners == ffn])


def _levelled(sizes: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """``sizes`` after ``n`` were taken away, always from the largest; ties from the first."""
    left = max(int(sizes.sum()) - n, 0)
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the highest level below which no more than ``left`` remains
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(sizes, level).sum() <= left else (low, level - 1)
    levelled = np.minimum(sizes, low)
    above = np.flatnonzero(sizes > low)
    spare = left - int(levelled.sum())  # fewer than there are above: else the level were higher
    levelled[above[len(above) - spare :]] += 1
    return levelled
