"""Conformance tests of ``pi2.accelerator.SupportsAsyncFfn``, an optional power; part of BackendTests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from pi2.accelerator import FfnDone, SupportsAsyncFfn
from pi2.api import Backend
from pi2.tensor import F32
from pi2.testing import reference
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import FfnCase, ffn_cases

NEURONS = (1, 2, 63, 64, 65, 200)  # around a cluster of 64
TOKENS = (1, 1, 2, 5)


@dataclass(frozen=True, slots=True)
class HotCase:
    """The first ``count`` neurons of an FFN are hot; its ``rows`` are not looked at."""

    ffn: FfnCase
    count: int


@st.composite
def hot_cases(draw: DrawFn) -> HotCase:
    """Any prefix of an FFN that is not empty."""
    case = draw(ffn_cases(tokens=TOKENS, neurons=NEURONS))
    k = len(case.bundles)
    return HotCase(case, draw(st.sampled_from((1, k)) | st.integers(1, k)))


def finish(backend: Backend, ticket: object, x: F32) -> tuple[F32, FfnDone]:
    """``finish_ffn`` into an array full of NaN; also checks that time does not run backwards."""
    out = np.full_like(x, np.nan)
    done = cast(SupportsAsyncFfn, backend).finish_ffn(ticket, out)
    assert done.start <= done.end
    return out, done


class AsyncFfnTests(PluginTests):
    """What ``SupportsAsyncFfn`` promises: the sum over a prefix of an FFN, whatever went before."""

    @pytest.fixture(scope="class")
    @classmethod
    def asynchronous(cls, backend: Backend) -> Backend:
        """The opened backend, if it has the power."""
        if not isinstance(backend, SupportsAsyncFfn):
            pytest.skip(
                f"{backend.name} computes nothing in the background"
                " (an optional power, pi2.accelerator.SupportsAsyncFfn)"
            )
        return backend

    @examples(150)
    @given(case=hot_cases(), prepare=st.booleans())
    def test_a_ticket_gives_the_sum_over_the_first_neurons(
        self, asynchronous: Backend, case: HotCase, prepare: bool
    ) -> None:
        """And the rest of them, by ``ffn``, makes it whole."""
        power, ffn = cast(SupportsAsyncFfn, asynchronous), case.ffn
        handle, before = asynchronous.place_ffn(ffn.bundles, ffn.spec), ffn.x.tobytes()
        if prepare:
            assert power.prepare_ffn(handle, len(ffn.x), case.count) in (True, False)
        got, done = finish(asynchronous, power.begin_ffn(handle, ffn.x, case.count), ffn.x)
        again, _ = finish(asynchronous, power.begin_ffn(handle, ffn.x, case.count), ffn.x)
        assert ffn.x.tobytes() == before, "changed its input"
        neurons = ffn.spec.geometry.unpack(ffn.bundles)
        expected = reference.ffn(neurons[: case.count], ffn.spec, ffn.x, asynchronous.tolerance)
        assert expected.output.accepts(got), f"off by {np.abs(got - expected.output.values).max()}"
        assert expected.accepts_count(done.active), f"{done.active} activations are not the true number"
        assert got.tobytes() == again.tobytes(), "the same call gave other bits"
        rest = np.full_like(got, np.nan)
        cold = np.arange(case.count, len(ffn.bundles), dtype=np.int32)
        asynchronous.ffn(handle, ffn.x, rest, cold)
        whole = reference.ffn(neurons, ffn.spec, ffn.x, asynchronous.tolerance).output
        total = got.astype(np.float64) + rest
        assert np.all(np.abs(total - whole.values) <= whole.bound)
        asynchronous.release(handle)

    @examples(60)
    @given(cases=st.lists(hot_cases(), min_size=2, max_size=4), cancelled=st.integers(0, 15))
    def test_a_ticket_that_is_given_up_leaves_nothing_behind(
        self, asynchronous: Backend, cases: list[HotCase], cancelled: int
    ) -> None:
        """Several FFNs in turn, twice; what was begun for some of them is cancelled."""
        power = cast(SupportsAsyncFfn, asynchronous)
        handles = [asynchronous.place_ffn(case.ffn.bundles, case.ffn.spec) for case in cases]
        first: dict[int, F32] = {}
        for at in (*range(len(cases)), *range(len(cases))):
            case = cases[at]
            if cancelled >> at & 1:
                x = case.ffn.x + np.float32(1)
                power.cancel_ffn(power.begin_ffn(handles[at], x, len(case.ffn.bundles)))
                x.fill(np.nan)
            got, _ = finish(asynchronous, power.begin_ffn(handles[at], case.ffn.x, case.count), case.ffn.x)
            assert got.tobytes() == first.setdefault(at, got).tobytes()
            neurons = case.ffn.spec.geometry.unpack(case.ffn.bundles)[: case.count]
            expected = reference.ffn(neurons, case.ffn.spec, case.ffn.x, asynchronous.tolerance)
            assert expected.output.accepts(got)
        for handle in handles:
            asynchronous.release(handle)
