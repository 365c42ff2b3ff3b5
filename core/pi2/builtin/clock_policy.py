"""CLOCK: first in, first out, with a second chance for what was used meanwhile."""

from __future__ import annotations

import numpy as np

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.fifo import Fifo
from pi2.builtin.key_table import KeyTable, grown

_GONE, _UNUSED, _USED = range(3)


class ClockPolicy(CachePolicy):
    """A ring of neurons; the hand passes over those used since it came by last, and clears their mark."""

    name = "clock"

    def __init__(self) -> None:
        self._table = KeyTable()
        self._state = np.zeros(0, np.int64)  # by index
        self._ring = Fifo()  # its front is where the hand points

    @classmethod
    def probe(cls) -> Probe:
        return Probe(6, "second chance")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._table.index(keys)
        self._state = grown(self._state, self._table.size)
        new = self._state[at] == _GONE
        self._state[at] = np.where(new, _UNUSED, _USED)
        self._ring.push(keys[new], at[new])

    def victims(self, ffn: int, n: int) -> Keys:
        unused = self._ring.first(n, lambda at: self._state[at] == _UNUSED)
        used = self._ring.first(n - len(unused), lambda at: self._state[at] == _USED)
        return np.concatenate((unused, used))

    def evicted(self, keys: Keys) -> None:
        gone = self._table.index(keys)
        self._state = grown(self._state, self._table.size)
        n = int(np.count_nonzero(self._state[gone]))
        whole_round = bool((self._state[gone] == _USED).any())  # the hand cleared every mark to get there
        self._state[gone] = _GONE
        if whole_round:
            np.minimum(self._state, _UNUSED, out=self._state)
        spared, at = self._ring.pop(n, lambda at: self._state[at] == _GONE)
        self._state[at] = _UNUSED
        self._ring.push(spared, at)
