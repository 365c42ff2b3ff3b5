"""The tables of a neuron cache, and the two things that every token asks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pi2.tensor import U8, Ids


@dataclass(frozen=True, slots=True)
class SlotTables:
    """Which neuron has which slot.  All arrays are C-contiguous and stay where they are."""

    slot_of: Ids
    """(ffns, neurons): -1 for a neuron without a slot."""
    key_of: NDArray[np.int64]
    """(slots,): number of the neuron in ``slot_of``, flattened; -1 for none."""
    states: U8
    """(slots,) ``SlotState``."""
    touched: NDArray[np.bool_]
    """(slots,): whether anything ever was there."""
    free: Ids
    """(slots,): a stack of the slots without a neuron, its top at ``n_free[0] - 1``."""
    n_free: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    """(1,)"""


class SlotSearch(Protocol):
    """What every token asks of the tables of a neuron cache."""

    def find(self, ffn: int, neurons: Ids) -> tuple[Ids, int]:
        """Slots of ``neurons``, a new array with -1 for those that have none, and how many these are."""
        ...

    def seat(self, ffn: int, neurons: Ids, slots: Ids) -> int:
        """Give slots from the top of the stack, EMPTY, to those of ``neurons`` that have -1 in ``slots``.

        One after the other, as long as there are free ones.  Returns how many got one.
        """
        ...


@runtime_checkable
class SupportsSlotSearch(Protocol):
    """Optional power of a backend that has a faster ``SlotSearch`` than ``NumpySlots``."""

    def slot_search(self, tables: SlotTables) -> SlotSearch:
        """Over these tables, which others also read and change between calls."""
        ...


class NumpySlots(SlotSearch):
    """In NumPy."""

    def __init__(self, tables: SlotTables) -> None:
        self._tables = tables

    def find(self, ffn: int, neurons: Ids) -> tuple[Ids, int]:
        slots: Ids = self._tables.slot_of[ffn][neurons]
        return slots, int(np.count_nonzero(slots < 0))

    def seat(self, ffn: int, neurons: Ids, slots: Ids) -> int:
        t = self._tables
        missing = np.flatnonzero(slots < 0)[: t.n_free[0]]
        left = int(t.n_free[0]) - len(missing)
        new = t.free[left : left + len(missing)][::-1]
        t.n_free[0] = left
        keys = neurons[missing].astype(np.int64) + ffn * t.slot_of.shape[1]
        t.slot_of[ffn][neurons[missing]] = new
        t.key_of[new] = keys
        t.states[new] = 0  # EMPTY
        t.touched[new] = True
        slots[missing] = new
        return len(missing)
