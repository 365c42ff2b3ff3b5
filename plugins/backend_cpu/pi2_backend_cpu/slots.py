"""Lookups in the tables of a neuron cache."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
from pi2.slot_tables import SlotSearch, SlotTables
from pi2.tensor import Ids

from pi2_backend_cpu import native


class Slots(SlotSearch):
    """``pi2.slot_tables.SupportsSlotSearch``: holds the tables, whose addresses the library is given."""

    def __init__(self, lib: ctypes.CDLL, tables: SlotTables) -> None:
        self._lib, self._tables = lib, tables
        arrays = (tables.slot_of, tables.key_of, tables.states, tables.touched, tables.free, tables.n_free)
        self._struct = native.Slots(*(a.ctypes.data for a in arrays), tables.slot_of.shape[1])

    def find(self, ffn: int, neurons: Ids) -> tuple[Ids, int]:
        slots = np.empty(len(neurons), np.int32)
        missing: int = self._lib.pi2_cpu_find_slots(
            byref(self._struct), ffn, neurons.ctypes.data, len(neurons), slots.ctypes.data
        )
        return slots, missing

    def seat(self, ffn: int, neurons: Ids, slots: Ids) -> int:
        seated: int = self._lib.pi2_cpu_seat_slots(
            byref(self._struct), ffn, neurons.ctypes.data, len(neurons), slots.ctypes.data
        )
        return seated
