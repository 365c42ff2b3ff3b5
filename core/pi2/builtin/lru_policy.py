"""The reference cache policy: the neuron that was not used for longest goes first."""

from __future__ import annotations

from itertools import islice

import numpy as np

from pi2.api import CachePolicy, Keys, Probe


class LruPolicy(CachePolicy):
    """Least recently used, over the whole model (PowerInfer-2 §4.2, cold region)."""

    name = "lru"

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # key -> nothing, oldest first

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "least recently used")

    def touch(self, ffn: int, keys: Keys) -> None:
        for key in keys.tolist():
            self._order.pop(key, None)
            self._order[key] = None

    def victims(self, ffn: int, n: int) -> Keys:
        return np.fromiter(islice(self._order, n), np.int64)

    def evicted(self, keys: Keys) -> None:
        for key in keys.tolist():
            self._order.pop(key, None)
