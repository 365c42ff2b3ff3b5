"""From neuron keys, wherever they lie in 64 bits, to indices of arrays that cache policies keep."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pi2.api import Keys

Indices = NDArray[np.int64]
T = TypeVar("T", np.int64, np.float32, np.bool_)

_PAGE = 1 << 12  # keys that get neighbouring indices
_DIRECT = 1 << 16  # pages that are looked up in an array, without a dict: keys below 2^28


class KeyTable:
    """Gives every key an index below ``size``, densely by pages of keys; an index is for ever."""

    def __init__(self) -> None:
        self.size = 0
        """Indices in use; the arrays beside this table must be at least as long."""
        self._pages = np.full(16, -1, np.int64)  # page -> its first index, for pages below _DIRECT
        self._far: dict[int, int] = {}
        self._page_of: list[int] = []  # page of every _PAGE indices
        self._straight = 0  # keys below are their own indices

    def keys(self, indices: Indices) -> Keys:
        """The keys that have ``indices``, all of which are in use."""
        found: Keys = np.array(self._page_of, np.int64)[indices // _PAGE] * _PAGE + indices % _PAGE
        return found

    def index(self, keys: Keys) -> Indices:
        """The index of every key, known before or not."""
        if not len(keys):
            return np.empty(0, np.int64)
        if keys.view(np.uint64).max() < self._straight:
            return keys.copy()
        pages = keys // _PAGE
        last = int(pages.max())
        if last >= _DIRECT or int(pages.min()) < 0:
            firsts = self._slow(pages)
        else:
            if last >= len(self._pages):
                self._pages = grown(self._pages, last + 1, fill=-1)
            firsts = self._pages[pages]
            if firsts.min() < 0:
                for page in np.unique(pages[firsts < 0]).tolist():
                    self._pages[page] = self._new_page(page)
                firsts = self._pages[pages]
        found: Indices = firsts + (keys - pages * _PAGE)
        return found

    def _slow(self, pages: NDArray[np.int64]) -> Indices:
        distinct, which = np.unique(pages, return_inverse=True)
        firsts = []
        for page in distinct.tolist():
            near = 0 <= page < len(self._pages)
            first = int(self._pages[page]) if near else self._far.get(page, -1)
            if first < 0:
                first = self._new_page(page)
                if 0 <= page < _DIRECT:
                    self._pages = grown(self._pages, page + 1, fill=-1)
                    self._pages[page] = first
                else:
                    self._far[page] = first
            firsts.append(first)
        return np.array(firsts, np.int64)[which]

    def _new_page(self, page: int) -> int:
        first = self.size
        if page * _PAGE == first == self._straight:
            self._straight += _PAGE
        self.size += _PAGE
        self._page_of.append(page)
        return first


def grown(array: NDArray[T], size: int, *, fill: int = 0) -> NDArray[T]:
    """``array`` with at least ``size`` elements, by doubling, the new ones ``fill``."""
    if size <= len(array):
        return array
    bigger = np.full(max(size, 2 * len(array)), fill, array.dtype)
    bigger[: len(array)] = array
    return bigger
