"""CLOCK: first in, first out, with a second chance for what was used meanwhile."""

from __future__ import annotations

import numpy as np

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import KeyTable, grown


class ClockPolicy(CachePolicy):
    """A ring of neurons; the hand passes over those used since it came by last, and clears their mark."""

    name = "clock"

    def __init__(self) -> None:
        self._table = KeyTable()
        self._here = np.zeros(0, np.int64)  # by index: 0 not here, 1 here, 2 here and used
        self._ring = np.empty(0, np.int64)  # keys, the hand at the first
        self._new: list[Keys] = []  # behind the ring

    @classmethod
    def probe(cls) -> Probe:
        return Probe(6, "second chance")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._table.index(keys)
        self._here = grown(self._here, self._table.size)
        new = self._here[at] == 0
        if new.any():
            self._new.append(keys[new])
        self._here[at] = np.where(new, 1, 2)

    def victims(self, ffn: int, n: int) -> Keys:
        ring = self._joined()
        unused = np.flatnonzero(self._here[self._table.index(ring)] == 1)
        if len(unused) >= n:
            return ring[unused[:n]]
        used = np.flatnonzero(self._here[self._table.index(ring)] == 2)
        return ring[np.concatenate((unused, used[: n - len(unused)]))]

    def evicted(self, keys: Keys) -> None:
        ring = self._joined()
        gone = self._table.index(keys)
        self._here = grown(self._here, self._table.size)
        self._here[gone] = 0
        state = self._here[self._table.index(ring)]
        last = np.flatnonzero(state == 0)
        passed = int(last[-1]) + 1 if len(last) else 0  # the hand went that far
        spared = ring[:passed][state[:passed] > 0]
        self._here[self._table.index(spared)] = 1
        self._ring = np.concatenate((ring[passed:], spared))

    def _joined(self) -> Keys:
        """The ring with the newcomers, in order."""
        if self._new:
            self._ring = np.concatenate((self._ring, *self._new))
            self._new.clear()
        return self._ring
