"""Least frequently used, where old uses count less and less."""

from __future__ import annotations

import numpy as np

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import Indices, KeyTable, grown
from pi2.errors import OptionError


class LfuPolicy(CachePolicy):
    """Counts uses; every ``half_life`` touches of an FFN (about that many tokens) all counts are halved.

    Ties go to the smaller key.
    """

    name = "lfu"

    def __init__(self, half_life: int = 64) -> None:
        if half_life < 1:
            raise OptionError(f"a half-life of {half_life} tokens cannot be", hint="1 or more")
        self._half_life = half_life
        self._table = KeyTable()
        self._counts = np.zeros(0, np.int64)  # by index, in 1/256 uses; 0: not here
        self._keys = np.zeros(0, np.int64)
        self._touches: dict[int, int] = {}

    @classmethod
    def probe(cls) -> Probe:
        return Probe(4, "least frequently used, with ageing")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._grown(keys)
        self._keys[at] = keys
        self._counts[at] += 256
        self._touches[ffn] = self._touches.get(ffn, 0) + 1
        # All counts at once, when the most touched FFN says that it is time.
        if self._touches[ffn] >= self._half_life:
            self._touches.clear()
            np.copyto(self._counts, np.maximum(self._counts >> 1, 1), where=self._counts > 0)

    def victims(self, ffn: int, n: int) -> Keys:
        here = np.flatnonzero(self._counts)
        if n < len(here):
            counts = self._counts[here]
            cut = np.partition(counts, n)[n] if n else 0
            below = here[counts < cut]
            ties = here[counts == cut]
            ties = ties[np.argsort(self._keys[ties], kind="stable")][: max(0, n - len(below))]
            here = np.concatenate((below, ties))
        order = np.lexsort((self._keys[here], self._counts[here]))
        return self._keys[here[order]]

    def evicted(self, keys: Keys) -> None:
        self._counts[self._grown(keys)] = 0

    def _grown(self, keys: Keys) -> Indices:
        at = self._table.index(keys)
        self._counts, self._keys = (grown(a, self._table.size) for a in (self._counts, self._keys))
        return at
