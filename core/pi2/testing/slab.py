"""Conformance tests of ``pi2.powers.SupportsSlab``, an optional power; part of BackendTests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from numpy.random import Generator

from pi2.api import Backend, FfnSpec
from pi2.powers import SupportsSlab
from pi2.tensor import F32, U8, Ids
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import FfnCase, displaced, ffn_cases, generators

ROWS = (1, 2, 17, 65, 300)  # more than one range of neurons, where a backend adds up by ranges
TOKENS = (0, 1, 1, 2, 5)


@dataclass(frozen=True, slots=True)
class SlabCase:
    """A call of ``ffn`` with rows, of which ``rows[i]`` lies in slot ``slots[i]`` of a slab."""

    ffn: FfnCase
    rows: Ids
    slots: Ids
    spare: int
    """Slots beyond those of the call."""

    def empty_slab(self, shift: int) -> U8:
        """(slots, stride) at any byte, full of what decodes to NaN."""
        shape = len(self.slots) + self.spare, self.ffn.bundles.shape[1]
        return displaced(np.full(shape, 255, np.uint8), shift).view(np.uint8)


@st.composite
def slab_cases(
    draw: DrawFn, tokens: tuple[int, ...] = TOKENS, specs: SearchStrategy[FfnSpec] | None = None
) -> SlabCase:
    """Some or all neurons of an FFN in slots of any order, among others."""
    case = draw(ffn_cases(tokens=tokens, neurons=ROWS, specs=specs))
    rows = np.arange(len(case.bundles), dtype=np.int32) if case.rows is None else case.rows
    spare, rng = draw(st.integers(0, 5)), draw(generators)
    slots = rng.permutation(len(rows) + spare)[: len(rows)].astype(np.int32)
    return SlabCase(case, rows, slots, spare)


def same_result(backend: Backend, placed: object, case: SlabCase, slab: object) -> None:
    """``slab_ffn`` and ``ffn`` with rows: the same bits, the same number of activations."""
    x = case.ffn.x
    expected, got = np.full_like(x, np.nan), np.full_like(x, np.nan)
    active = backend.ffn(placed, x, expected, case.rows)
    found = cast(SupportsSlab, backend).slab_ffn(slab, case.rows, case.slots, x, got)
    assert _bits(got) == _bits(expected)
    assert found == active


def _bits(values: F32) -> bytes:
    return values.tobytes()


class SlabTests(PluginTests):
    """What ``SupportsSlab`` promises: the bits of ``ffn``, wherever neurons lie."""

    @pytest.fixture(scope="class")
    @classmethod
    def slabs(cls, backend: Backend) -> Backend:
        """The opened backend, if it has the power."""
        if not isinstance(backend, SupportsSlab):
            pytest.skip(f"{backend.name} has no slabs (an optional power, pi2.powers.SupportsSlab)")
        return backend

    @examples(100)
    @given(case=slab_cases(), shift=st.integers(0, 63))
    def test_a_slab_gives_the_bits_of_the_ffn(self, slabs: Backend, case: SlabCase, shift: int) -> None:
        """The slab is filled only after it was placed."""
        slab = case.empty_slab(shift)
        handle = cast(SupportsSlab, slabs).place_slab(slab, len(case.ffn.bundles), case.ffn.spec)
        slab[case.slots] = case.ffn.bundles[case.rows]
        placed = slabs.place_ffn(case.ffn.bundles, case.ffn.spec)
        same_result(slabs, placed, case, handle)
        slabs.release(placed)
        slabs.release(handle)

    @examples(60)
    @given(case=slab_cases(), rng=generators)
    def test_a_slab_may_change_between_calls(self, slabs: Backend, case: SlabCase, rng: Generator) -> None:
        """Neurons of another FFN, elsewhere, and again the first ones."""
        slab = case.empty_slab(0)
        handle = cast(SupportsSlab, slabs).place_slab(slab, len(case.ffn.bundles), case.ffn.spec)
        for bundles in (case.ffn.bundles, case.ffn.bundles[::-1], case.ffn.bundles):
            ffn = FfnCase(bundles, case.ffn.spec, case.ffn.x, case.ffn.rows)
            moved = SlabCase(ffn, case.rows, rng.permutation(case.slots), case.spare)
            slab[moved.slots] = bundles[moved.rows]
            placed = slabs.place_ffn(bundles, case.ffn.spec)
            same_result(slabs, placed, moved, handle)
            slabs.release(placed)
        slabs.release(handle)
