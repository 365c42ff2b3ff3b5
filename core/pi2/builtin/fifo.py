"""A queue of neuron keys that is walked from its front and filled from its end, array by array."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pi2.api import Keys
from pi2.builtin.key_table import Indices

Chosen = Callable[[Indices], NDArray[np.bool_]]
_LONG = 1 << 12  # arrays shorter than this are joined, or a queue would become thousands of them


class Fifo:
    """First in, first out.  Beside every key stands its index in the arrays of its policy."""

    def __init__(self) -> None:
        self._arrays: deque[tuple[Keys, Indices]] = deque()
        self.length = 0

    def push(self, keys: Keys, at: Indices) -> None:
        """Append ``keys``, whose indices are ``at``."""
        if not len(keys):
            return
        self.length += len(keys)
        if self._arrays and len(self._arrays[-1][0]) + len(keys) <= _LONG:
            last = self._arrays.pop()
            keys, at = np.concatenate((last[0], keys)), np.concatenate((last[1], at))
        self._arrays.append((keys.copy(), at.copy()))

    def first(self, n: int, chosen: Chosen) -> Keys:
        """The first ``n`` keys that are ``chosen``, or all that are."""
        found: list[Keys] = []
        for keys, at in self._arrays:
            if n <= 0:
                break
            found.append(keys[chosen(at)][:n])
            n -= len(found[-1])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def pop(self, n: int, gone: Chosen) -> tuple[Keys, Indices]:
        """Take off the front until ``n`` keys that are ``gone`` came; the others that came, in order."""
        passed: list[tuple[Keys, Indices]] = []
        while n > 0 and self._arrays:
            keys, at = self._arrays.popleft()
            leaving = gone(at)
            last = np.flatnonzero(leaving)[n - 1] if leaving.sum() >= n else len(keys) - 1
            n -= int(leaving.sum())
            stay = slice(last + 1, None)
            if len(keys[stay]):
                self._arrays.appendleft((keys[stay], at[stay]))
            spared = ~leaving[: last + 1]
            passed.append((keys[: last + 1][spared], at[: last + 1][spared]))
            self.length -= last + 1
        if not passed:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([p[0] for p in passed]), np.concatenate([p[1] for p in passed])
