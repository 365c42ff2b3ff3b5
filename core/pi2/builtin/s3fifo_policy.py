"""S3-FIFO: newcomers prove themselves in a small queue before they enter the main one.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi2.api import CachePolicy, Keys, Probe
from pi2.builtin.fifo import Fifo
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
        self._small, self._main, self._ghosts = Fifo(), Fifo(), Fifo()

    @classmethod
    def probe(cls) -> Probe:
        return Probe(7, "a small queue on trial before the main one")

    def touch(self, ffn: int, keys: Keys) -> None:
        at = self._grown(keys)
        place = self._place[at]
        self._uses[at] = np.where(place >= _SMALL, np.minimum(self._uses[at] + 1, _MOST_USES), 0)
        new, back = place == _ABSENT, place == _GHOST
        self._place[at] = np.where(new, _SMALL, np.where(back, _MAIN, place))
        self._small.push(keys[new], at[new])
        self._main.push(keys[back], at[back])

    def victims(self, ffn: int, n: int) -> Keys:
        small, main = self._small, self._main
        surplus = max(0, small.length - int(self._share * (small.length + main.length)))
        found = [small.first(min(n, surplus), lambda at: self._uses[at] < _PROVEN)]
        left = n - len(found[0])
        for uses in range(_MOST_USES + 1):  # a use is a second chance: those with fewer first, each in order
            if left > 0:
                # mypy infers no type for a lambda with a default
                # mypy infers no type for a lambda with a default
                found.append(main.first(left, lambda at, uses=uses: self._uses[at] == uses))  # type: ignore[misc]
                left -= len(found[-1])
        if left > 0:  # all but what was named first
            named = np.zeros_like(self._place, np.bool_)
            named[self._table.index(found[0])] = True
            found.append(small.first(left, lambda at: ~named[at]))
        return np.concatenate(found)

    def evicted(self, keys: Keys) -> None:
        at = self._grown(keys)
        place = self._place[at]
        from_small, from_main = place == _SMALL, place == _MAIN
        self._place[at[from_small | from_main]] = _ABSENT
        self._pass_small(int(np.count_nonzero(from_small)))
        self._pass_main(int(np.count_nonzero(from_main)))
        self._remember(keys[from_small], at[from_small])

    def _pass_small(self, n: int) -> None:
        """Take ``n`` keys that left out; of those passed over, the proven enter the main queue."""
        spared, at = self._small.pop(n, lambda at: self._place[at] == _ABSENT)
        proven = self._uses[at] >= _PROVEN
        self._uses[at[proven]], self._place[at[proven]] = 0, _MAIN
        self._main.push(spared[proven], at[proven])
        self._small.push(spared[~proven], at[~proven])

    def _pass_main(self, n: int) -> None:
        """Take ``n`` keys that left out; those passed over go round with a use less."""
        spared, at = self._main.pop(n, lambda at: self._place[at] == _ABSENT)
        self._uses[at] = np.maximum(self._uses[at] - 1, 0)
        self._main.push(spared, at)

    def _remember(self, keys: Keys, at: Indices) -> None:
        self._place[at] = _GHOST
        self._uses[at] = 0
        self._ghosts.push(keys, at)
        surplus = self._ghosts.length - self._small.length - self._main.length
        if surplus > 0:  # counted with those that came back meanwhile, so that the queue has an end
            oldest = self._table.index(self._ghosts.first(surplus, _all))
            self._ghosts.pop(surplus, _all)
            self._place[oldest[self._place[oldest] == _GHOST]] = _ABSENT

    def _grown(self, keys: Keys) -> Indices:
        at = self._table.index(keys)
        self._place, self._uses = (grown(a, self._table.size) for a in (self._place, self._uses))
        return at


def _all(at: Indices) -> NDArray[np.bool_]:
    return np.ones(len(at), np.bool_)
