"""Least frequently used: what was counted before and what is used now, where old uses count less."""

from __future__ import annotations

import numpy as np

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import Indices, KeyTable, grown
from pi2.errors import OptionError
from pi2.tensor import F32

_RESCALE = 1e12  # the weight of a use at which all scores are brought down again


class LfuPolicy(CachePolicy):
    """The residents that are used least often leave first; has ``SupportsPrior`` and ``SupportsGuesses``.

    A use counts half after ``half_life`` tokens, a quarter after twice as many; residents or not, so that
    who comes back is known.  How often a neuron was used when that was counted weighs as much as its
    uses of late.  What was read on a guess has not been used yet.
    """

    name = "lfu"

    def __init__(self, half_life: int = 16) -> None:
        if half_life < 1:
            raise OptionError(f"a half-life of {half_life} tokens cannot be", hint="1 or more")
        self._growth = 2 ** (1 / half_life)
        self._table = KeyTable()
        # By index.  Scores are kept in units that grow, instead of being halved all the time.
        self._scores = np.zeros(0, np.float32)
        self._prior = np.zeros(0, np.float32)
        self._here = np.zeros(0, np.bool_)
        self._unit = 1.0
        self._last, self._several = -1, False

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "least frequently used, with ageing, from the counts of pi2 collect")

    def expect(self, keys: Keys, shares: F32) -> None:
        at = self._index(keys)
        tokens = 1 / (1 - 1 / self._growth)  # that uses of late come from, weighed by age
        self._prior[at] = shares * tokens
        self._scores[at] = shares * (tokens * self._unit)

    def touch(self, ffn: int, keys: Keys) -> None:
        if ffn < self._last or not self._several:
            self._next_token()
        self._several |= self._last not in (-1, ffn)
        self._last = ffn
        at = self._index(keys)
        self._scores[at] += np.float32(self._unit)
        self._here[at] = True

    def guessed(self, keys: Keys) -> None:
        at = self._index(keys)  # makes room
        self._here[at] = True

    def victims(self, ffn: int, n: int) -> Keys:
        here = np.flatnonzero(self._here)
        scores = self._scores[here] + self._prior[here] * np.float32(self._unit)
        if 0 < n < len(here):
            least = scores <= np.partition(scores, n - 1)[n - 1]
            here, scores = here[least], scores[least]
        keys = self._table.keys(here)
        victims: Keys = keys[np.lexsort((keys, scores))][:n]
        return victims

    def evicted(self, keys: Keys) -> None:
        at = self._index(keys)  # makes room
        self._here[at] = False

    def _next_token(self) -> None:
        self._unit *= self._growth
        if self._unit > _RESCALE:
            self._scores /= np.float32(self._unit)
            self._unit = 1.0

    def _index(self, keys: Keys) -> Indices:
        at = self._table.index(keys)
        if self._table.size > len(self._scores):
            self._scores, self._prior = (grown(a, self._table.size) for a in (self._scores, self._prior))
            self._here = grown(self._here, self._table.size)
        return at
