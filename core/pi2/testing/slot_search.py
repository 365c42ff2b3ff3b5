"""Conformance tests of ``pi2.slot_tables.SupportsSlotSearch``, an optional power; part of BackendTests."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from pi2.api import Backend
from pi2.slot_tables import NumpySlots, SlotSearch, SlotTables, SupportsSlotSearch
from pi2.tensor import Ids
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import generators

_FFNS = 3


def _tables(rng: Generator, neurons: int, slots: int) -> SlotTables:
    """Some neurons have slots, in an order of their own; the other slots are free."""
    taken = int(rng.integers(0, min(slots, _FFNS * neurons) + 1))
    order = rng.permutation(slots).astype(np.int32)
    keys = rng.permutation(_FFNS * neurons)[:taken]
    slot_of, key_of = np.full(_FFNS * neurons, -1, np.int32), np.full(slots, -1, np.int64)
    slot_of[keys], key_of[order[:taken]] = order[:taken], keys
    states, touched = rng.integers(0, 4, slots).astype(np.uint8), rng.random(slots) < 0.5
    free = np.concatenate((order[taken:], order[:taken]))
    n_free = np.array([slots - taken])
    return SlotTables(slot_of.reshape(_FFNS, neurons), key_of, states, touched, free, n_free)


def _state(t: SlotTables) -> list[list[int]]:
    """All that may be looked at: not the stack above its top."""
    free = t.free[: t.n_free[0]]
    arrays: tuple[NDArray[Any], ...] = (t.slot_of, t.key_of, t.states, t.touched, free)
    return [a.reshape(-1).tolist() for a in arrays]


class SlotSearchTests(PluginTests):
    """What ``SupportsSlotSearch`` promises: what NumPy finds and changes."""

    @pytest.fixture(scope="class")
    @classmethod
    def searching(cls, backend: Backend) -> Backend:
        """The opened backend, if it has the power."""
        if not isinstance(backend, SupportsSlotSearch):
            pytest.skip(
                f"{backend.name} searches no tables (an optional power, pi2.slot_tables.SupportsSlotSearch)"
            )
        return backend

    @examples(200)
    @given(rng=generators, neurons=st.integers(1, 60), slots=st.integers(1, 120), calls=st.integers(1, 6))
    def test_slots_are_found_and_given_out_as_numpy_does(
        self, searching: Backend, rng: Generator, neurons: int, slots: int, calls: int
    ) -> None:
        """Call after call, also when there are too few slots."""
        expected = _tables(rng, neurons, slots)
        tables = copy.deepcopy(expected)
        right: SlotSearch = NumpySlots(expected)
        search = cast(SupportsSlotSearch, searching).slot_search(tables)
        for _ in range(calls):
            ffn = int(rng.integers(_FFNS))
            asked: Ids = np.flatnonzero(rng.random(neurons) < rng.random()).astype(np.int32)
            (found, missing), (should, lack) = search.find(ffn, asked), right.find(ffn, asked)
            assert found.dtype == np.int32
            assert (found.tolist(), missing) == (should.tolist(), lack)
            assert search.seat(ffn, asked, found) == right.seat(ffn, asked, should)
            assert found.tolist() == should.tolist()
            assert _state(tables) == _state(expected)
