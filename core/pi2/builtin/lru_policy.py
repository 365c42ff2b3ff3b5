"""The reference cache policy: the neuron that was not used for longest goes first."""

from __future__ import annotations

from collections import deque

import numpy as np

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import Indices, KeyTable, grown

_Entry = tuple[Keys, Indices, int]  # keys as they were touched, their indices, the first one's stamp


class RecencyLog:
    """Keys in order of last use.  Uses are only appended; what is stale is skipped when it comes up.

    A key's stamp counts uses, so that an entry of the log holds for a key exactly if it has its stamp.
    """

    def __init__(self) -> None:
        self.residents = 0
        self._table = KeyTable()
        self._stamps = np.zeros(0, np.int64)  # by index; 0: not here
        self._clock = 1
        self._log: deque[_Entry] = deque()
        self._logged = 0

    def use(self, keys: Keys) -> None:
        """Make ``keys`` the latest, in their order."""
        if not len(keys):
            return
        at = self._table.index(keys)
        self._stamps = grown(self._stamps, self._table.size)
        self.residents += int(np.count_nonzero(self._stamps[at] == 0))
        self._stamps[at] = np.arange(self._clock, self._clock + len(keys))
        self._log.append((keys.copy(), at, self._clock))
        self._clock += len(keys)
        self._logged += len(keys)
        if self._logged > 4 * self.residents + 4096:
            self._compact()

    def oldest(self, n: int) -> Keys:
        """The ``n`` keys (or all) that were not used for longest, oldest first."""
        found, wanted = [], n
        while self._log and wanted > 0 and not len(self._alive(self._log[0])[0]):
            self._logged -= len(self._log.popleft()[0])
        for entry in self._log:
            if wanted <= 0:
                break
            keys = self._alive(entry)[0][:wanted]
            found.append(keys)
            wanted -= len(keys)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def forget(self, keys: Keys) -> None:
        """Drop ``keys``, as far as they are here."""
        at = self._table.index(keys)
        self._stamps = grown(self._stamps, self._table.size)
        self.residents -= int(np.count_nonzero(self._stamps[at]))
        self._stamps[at] = 0

    def _alive(self, entry: _Entry) -> tuple[Keys, Indices]:
        """The keys of an entry that were not used later, and their indices."""
        keys, at, first = entry
        alive = self._stamps[at] == np.arange(first, first + len(keys))
        return keys[alive], at[alive]

    def _compact(self) -> None:
        """One entry of all residents: its length is that of what was appended since, so it costs little."""
        parts = [self._alive(entry) for entry in self._log]
        keys, at = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._stamps[at] = np.arange(self._clock, self._clock + len(keys))
        self._log = deque([(keys, at, self._clock)])
        self._clock += len(keys)
        self._logged = len(keys)


class LruPolicy(CachePolicy):
    """Least recently used, over the whole model (PowerInfer-2 §4.2, cold region)."""

    name = "lru"

    def __init__(self) -> None:
        self._order = RecencyLog()

    @classmethod
    def probe(cls) -> Probe:
        return Probe(9, "least recently used")

    def touch(self, ffn: int, keys: Keys) -> None:
        self._order.use(keys)

    def victims(self, ffn: int, n: int) -> Keys:
        return self._order.oldest(n)

    def evicted(self, keys: Keys) -> None:
        self._order.forget(keys)
