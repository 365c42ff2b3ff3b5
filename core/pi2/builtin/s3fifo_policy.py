"""S3-FIFO: newcomers prove themselves in a small queue before they enter the main one.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.key_table import Indices, KeyTable, grown
from pi2.errors import OptionError

_ABSENT, _GHOST, _SMALL, _MAIN = range(4)
_MOST_USES = 3
_PROVEN = 2  # uses in the small queue that earn a place in the main one


class S3FifoPolicy(CachePolicy):
    """Two queues, of which the small one gives up first while it has more than ``small`` of the residents.

    What leaves the small queue is remembered (as many keys as there are residents) and enters the main
    queue when it comes back.
    """

    name = "s3fifo"

    def __init__(self, small: float = 0.1) -> None:
        if not 0 < small < 1:
            raise OptionError(f"the small queue cannot have {small:g} of the cache", hint="for example 0.1")
        self._share = small
        self._table = KeyTable()
        self._place = np.zeros(0, np.int64)  # by index
        self._uses = np.zeros(0, np.int64)
        self._queues: dict[int, Keys] = {which: np.empty(0, np.int64) for which in (_GHOST, _SMALL, _MAIN)}

    @classmethod
    def probe(cls) -> Probe:
        return Probe(7, "a small queue on trial before the main one")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._grown(keys)
        place = self._place[at]
        self._uses[at] = np.where(place >= _SMALL, np.minimum(self._uses[at] + 1, _MOST_USES), 0)
        for which, new in ((_SMALL, place == _ABSENT), (_MAIN, place == _GHOST)):
            if new.any():
                self._queues[which] = np.concatenate((self._queues[which], keys[new]))
                self._place[at[new]] = which
        if (place == _GHOST).any():
            self._queues[_GHOST] = self._of(_GHOST)

    def victims(self, ffn: int, n: int) -> Keys:
        small, main = self._queues[_SMALL], self._queues[_MAIN]
        on_trial = self._uses_of(small) < _PROVEN
        surplus = max(0, len(small) - int(self._share * (len(small) + len(main))))
        first = np.flatnonzero(on_trial)[:surplus]
        # The main queue: a use is a second chance, so those with fewer uses come first, each in order.
        by_uses = np.argsort(self._uses_of(main), kind="stable")
        rest = np.ones(len(small), bool)
        rest[first] = False
        ordered = np.concatenate((small[first], main[by_uses], small[rest]))
        return ordered[:n]

    def evicted(self, keys: Keys) -> None:
        at = self._grown(keys)
        left_small = keys[self._place[at] == _SMALL]
        self._pass(_SMALL, keys)
        self._pass(_MAIN, keys)
        self._place[at] = _ABSENT
        self._uses[at] = 0
        self._remember(left_small)

    def _pass(self, which: int, gone: Keys) -> None:
        """Take ``gone`` out of a queue.  Those passed over on the way to the last move to the main one's end,

        from the main queue with a use less, from the small one if they have proven themselves.
        """
        queue = self._queues[which]
        leaves = np.isin(queue, gone)
        last = np.flatnonzero(leaves)
        passed = np.arange(len(queue)) < (last[-1] if len(last) else 0)
        moves = passed & ~leaves & (self._uses_of(queue) >= (_PROVEN if which == _SMALL else 1))
        moved, at = queue[moves], self._table.index(queue[moves])
        self._uses[at] = 0 if which == _SMALL else self._uses[at] - 1
        self._place[at] = _MAIN
        self._queues[which] = queue[~leaves & ~moves]
        self._queues[_MAIN] = np.concatenate((self._queues[_MAIN], moved))

    def _remember(self, keys: Keys) -> None:
        self._place[self._table.index(keys)] = _GHOST
        ghosts = np.concatenate((self._queues[_GHOST], keys))
        most = len(self._queues[_SMALL]) + len(self._queues[_MAIN])
        forgotten = ghosts[: max(0, len(ghosts) - most)]
        self._place[self._table.index(forgotten)] = _ABSENT
        self._queues[_GHOST] = ghosts[len(forgotten) :]

    def _of(self, which: int) -> Keys:
        queue = self._queues[which]
        there: Keys = queue[self._place[self._table.index(queue)] == which]
        return there

    def _uses_of(self, queue: Keys) -> NDArray[np.int64]:
        uses: NDArray[np.int64] = self._uses[self._table.index(queue)]
        return uses

    def _grown(self, keys: Keys) -> Indices:
        at = self._table.index(keys)
        self._place, self._uses = (grown(a, self._table.size) for a in (self._place, self._uses))
        return at
