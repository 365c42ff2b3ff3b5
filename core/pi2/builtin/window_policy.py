"""The sliding window of LLM in a Flash: what the last few tokens did not use leaves, room or not."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from pi2.api import Keys, Probe
from pi2.builtin.key_table import Indices, KeyTable, grown
from pi2.builtin.lru_policy import LruPolicy
from pi2.errors import OptionError


class WindowPolicy(LruPolicy):
    """Keeps what the last ``tokens`` tokens used (LLM in a Flash, arXiv 2312.11514 §3.1); with 0 nothing.

    It has ``SupportsExpiry``.  For comparison: ``lru`` is the window that fills the memory there is.
    """

    name = "window"

    def __init__(self, tokens: int = 5) -> None:
        if tokens < 0:
            raise OptionError(f"a window of {tokens} tokens cannot be", hint="0 or more")
        super().__init__()
        self._tokens = tokens
        self._table = KeyTable()
        self._last = np.zeros(0, np.int64)  # by index: when the key was used last, in tokens of its FFN
        self._now: defaultdict[int, int] = defaultdict(int)
        self._uses: defaultdict[int, deque[tuple[int, Keys, Indices]]] = defaultdict(deque)

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "what the last few tokens used: LLM in a Flash, for comparison")

    def touch(self, ffn: int, keys: Keys) -> None:
        super().touch(ffn, keys)
        at, now = self._table.index(keys), self._now[ffn]
        self._last = grown(self._last, self._table.size)
        self._last[at] = now
        self._uses[ffn].append((now, keys.copy(), at))

    def evicted(self, keys: Keys) -> None:
        super().evicted(keys)
        at = self._table.index(keys)
        self._last = grown(self._last, self._table.size)
        self._last[at] = -1

    def expire(self, ffn: int) -> Keys:
        """Residents of ``ffn`` that the window leaves behind when it moves on (powers.SupportsExpiry)."""
        self._now[ffn] += 1
        uses, gone = self._uses[ffn], [np.empty(0, np.int64)]
        while uses and uses[0][0] < self._now[ffn] - self._tokens:
            when, keys, at = uses.popleft()
            gone.append(keys[self._last[at] == when])
        return np.unique(np.concatenate(gone))
