"""Conformance tests of backends: every call against float64, at awkward sizes, places and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator

from pi2.api import Backend
from pi2.tensor import F32, Ids, Tensor
from pi2.testing import reference
from pi2.testing.asynchronous import AsyncFfnTests
from pi2.testing.attention import AttentionTests
from pi2.testing.low_rank import LowRankTests
from pi2.testing.plugin import examples
from pi2.testing.slab import SlabTests
from pi2.testing.slot_search import SlotSearchTests
from pi2.testing.strategies import (
    SPARSE,
    FfnCase,
    LinearCase,
    displaced,
    ffn_cases,
    generators,
    linear_cases,
    tensors,
)
from pi2.testing.streaming import StreamingTests

COARSEST_TOLERANCE = 0.02
"""A backend may round inputs to eight bits: half a step of 1/127 for x, as much again for what follows."""

_GUARD = 64  # floats on either side of an output that must survive
_GUARD_BITS = 0x7FC0DEAD  # a NaN that no arithmetic makes
_BAD = st.sampled_from((np.nan, np.inf, -np.inf))


class Output:
    """A result (n, cols) full of NaN, at any multiple of four bytes, between guards."""

    def __init__(self, n: int, cols: int, shift: int) -> None:
        self._room = displaced(np.full(n * cols + 2 * _GUARD, _GUARD_BITS, np.uint32), 4 * shift)
        self.values: F32 = self._room[_GUARD : _GUARD + n * cols].view(np.float32).reshape(n, cols)

    def check(self) -> F32:
        """The values, once it is sure that nothing beside them was written and none was left out."""
        guards = np.concatenate((self._room[:_GUARD], self._room[-_GUARD:]))
        assert np.all(guards == _GUARD_BITS), "wrote outside of out"
        left = np.count_nonzero(self.values.view(np.uint32) == _GUARD_BITS)
        assert not left, f"left {left} elements of out unwritten"
        return self.values.copy()


def call_linear(backend: Backend, weight: object, x: F32, rows: Ids | None, n_out: int) -> F32:
    """``backend.linear`` into a guarded output; also checks that ``x`` was left alone."""
    out, before = Output(len(x), n_out, x.size % 5), x.tobytes()
    backend.linear(weight, x, out.values, rows)
    assert x.tobytes() == before, "changed its input"
    return out.check()


def call_ffn(backend: Backend, ffn: object, x: F32, rows: Ids | None = None) -> tuple[F32, int]:
    """``backend.ffn`` into a guarded output; also checks that ``x`` was left alone."""
    out, before = Output(len(x), x.shape[1], x.size % 5), x.tobytes()
    count = backend.ffn(ffn, x, out.values, rows)
    assert x.tobytes() == before, "changed its input"
    return out.check(), count


def same_bits(a: F32, b: F32) -> bool:
    """Equal as bytes: -0.0 is not 0.0, and a NaN is itself."""
    return a.tobytes() == b.tobytes()


class BackendTests(AsyncFfnTests, AttentionTests, LowRankTests, SlotSearchTests, SlabTests, StreamingTests):
    """Everything that ``pi2.api.Backend`` promises, and its optional powers where they are had.

    class TestMine(BackendTests):
        plugin = MyBackend
    """

    plugin: ClassVar[type[Backend]]

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, runnable: type[Backend]) -> Iterator[Backend]:
        """One opened backend for all tests of the class."""
        opened = runnable.open(cls.options)
        yield opened
        opened.close()

    def test_its_tolerance_is_positive_and_finer_than_eight_bits(self, backend: Backend) -> None:
        assert 0 < backend.tolerance <= COARSEST_TOLERANCE

    @examples(200)
    @given(case=linear_cases())
    def test_linear_is_the_matrix_product_of_the_exact_weights(
        self, backend: Backend, case: LinearCase
    ) -> None:
        handle = backend.place(case.weight)
        got = call_linear(backend, handle, case.x, case.rows, _rows_out(case))
        again = call_linear(backend, handle, case.x, case.rows, _rows_out(case))
        backend.release(handle)
        expected = reference.linear(case.weight, case.x, case.rows, backend.tolerance)
        assert expected.accepts(got), f"off by {np.abs(got - expected.values).max()}"
        assert same_bits(got, again), "the same call gave other bits"

    @examples(300)
    @given(case=ffn_cases())
    def test_ffn_is_the_sum_over_its_neurons(self, backend: Backend, case: FfnCase) -> None:
        handle = backend.place_ffn(case.bundles, case.spec)
        got, count = call_ffn(backend, handle, case.x, case.rows)
        again, count_again = call_ffn(backend, handle, case.x, case.rows)
        backend.release(handle)
        expected = reference.ffn(case.neurons, case.spec, case.x, backend.tolerance)
        assert expected.output.accepts(got), f"off by {np.abs(got - expected.output.values).max()}"
        assert expected.accepts_count(count), f"{count} activations are not the true number"
        assert same_bits(got, again), "the same call gave other bits"
        assert count == count_again

    @examples(150)
    @given(case=ffn_cases(tokens=(1,), activations=SPARSE), rng=generators)
    def test_neurons_that_are_zero_change_no_bit(
        self, backend: Backend, case: FfnCase, rng: Generator
    ) -> None:
        """For n = 1: the active rows alone, any superset of them, and all rows (``rows=None``) agree."""
        handle, k = backend.place_ffn(case.bundles, case.spec), len(case.bundles)
        alone = [call_ffn(backend, handle, case.x, np.array([i], np.int32))[1] for i in range(k)]
        active = np.array(alone, dtype=bool)
        dense, count = call_ffn(backend, handle, case.x)
        assert count == active.sum(), "a neuron is active alone but not among others, or the reverse"
        for share in (0.0, 0.3, 1.0):
            rows = np.flatnonzero(active | (rng.random(k) < share)).astype(np.int32)
            got, count = call_ffn(backend, handle, case.x, rows)
            assert same_bits(got, dense)
            assert count == active.sum()
        backend.release(handle)

    @examples(150)
    @given(case=ffn_cases(), rng=generators, clusters=st.integers(1, 6))
    def test_any_partition_into_clusters_adds_up_to_the_dense_ffn(
        self, backend: Backend, case: FfnCase, rng: Generator, clusters: int
    ) -> None:
        """Both ways of naming a cluster: a handle of its own, and rows of the whole FFN's handle."""
        member = rng.integers(0, clusters, len(case.bundles))
        whole = backend.place_ffn(case.bundles, case.spec)
        placed = picked = np.zeros(case.x.shape)
        for cluster in range(clusters):
            rows = np.flatnonzero(member == cluster).astype(np.int32)
            handle = backend.place_ffn(case.bundles[rows], case.spec)
            placed = placed + call_ffn(backend, handle, case.x)[0]
            picked = picked + call_ffn(backend, whole, case.x, rows)[0]
            backend.release(handle)
        backend.release(whole)
        neurons = case.spec.geometry.unpack(case.bundles)
        expected = reference.ffn(neurons, case.spec, case.x, backend.tolerance).output
        assert np.all(np.abs(placed - expected.values) <= expected.bound)
        assert np.all(np.abs(picked - expected.values) <= expected.bound)

    @examples(100)
    @given(case=linear_cases(tokens=(1, 2, 5)), rng=generators, bad=_BAD)
    def test_linear_keeps_what_is_not_finite_in_its_row(
        self, backend: Backend, case: LinearCase, rng: Generator, bad: float
    ) -> None:
        handle = backend.place(case.weight)
        clean = call_linear(backend, handle, case.x, case.rows, _rows_out(case))
        spoilt, token = _spoil(case.x, rng, bad)
        with np.errstate(all="ignore"):
            got = call_linear(backend, handle, spoilt, case.rows, _rows_out(case))
        backend.release(handle)
        assert not np.isfinite(got[token]).any(), "a finite result of an input that was not"
        assert same_bits(np.delete(got, token, 0), np.delete(clean, token, 0))

    @examples(150)
    @given(case=ffn_cases(tokens=(1, 2, 5)), rng=generators, bad=_BAD)
    def test_ffn_keeps_what_is_not_finite_in_its_row(
        self, backend: Backend, case: FfnCase, rng: Generator, bad: float
    ) -> None:
        """A NaN always shows.  An infinity shows unless it turns every neuron off, which is a true zero."""
        handle = backend.place_ffn(case.bundles, case.spec)
        clean, _ = call_ffn(backend, handle, case.x, case.rows)
        spoilt, token = _spoil(case.x, rng, bad)
        with np.errstate(all="ignore"):
            got, _ = call_ffn(backend, handle, spoilt, case.rows)
            shows = _some_neuron_stays_on(case, spoilt[token])
        backend.release(handle)
        if shows:
            assert not np.isfinite(got[token]).any(), "a finite result of an input that was not"
        assert same_bits(np.delete(got, token, 0), np.delete(clean, token, 0))

    @examples(30)
    @given(weights=st.lists(tensors(), min_size=2, max_size=12), case=ffn_cases(), rng=generators)
    def test_handles_are_independent_and_released_in_any_order(
        self, backend: Backend, weights: list[Tensor], case: FfnCase, rng: Generator
    ) -> None:
        handles = [backend.place(weight) for weight in weights]
        ffns = [backend.place_ffn(case.bundles, case.spec) for _ in weights]
        first = call_ffn(backend, ffns[0], case.x)[0]
        for at in rng.permutation(len(weights)):
            x = np.ones((1, weights[at].cols), np.float32)
            got = call_linear(backend, handles[at], x, None, weights[at].rows)
            assert reference.linear(weights[at], x, None, backend.tolerance).accepts(got)
            assert same_bits(call_ffn(backend, ffns[at], case.x)[0], first)
            backend.release(handles[at])
            backend.release(ffns[at])


def _rows_out(case: LinearCase) -> int:
    return case.weight.rows if case.rows is None else len(case.rows)


def _spoil(x: F32, rng: Generator, bad: float) -> tuple[F32, int]:
    """A copy of ``x`` (n, cols), n > 0, with one bad element, and the row that it is in."""
    spoilt, token = x.copy(), int(rng.integers(len(x)))
    spoilt[token, rng.integers(x.shape[1])] = bad
    return spoilt, token


def _some_neuron_stays_on(case: FfnCase, x: F32) -> bool:
    """Whether a neuron's factors are all other than the limit 0 of act(-inf), relu(-inf); x (d,)."""
    neurons = case.neurons
    up = _pre(neurons.up, neurons.up_bias, x)
    if neurons.gate is None:
        return bool(np.any(up != -np.inf))
    off = _pre(neurons.gate, neurons.gate_bias, x) == -np.inf
    return bool(np.any(~off & ~(case.spec.up_relu & (up == -np.inf))))


def _pre(weights: F32, bias: F32 | None, x: F32) -> reference.F64:
    dots: reference.F64 = (weights.astype(np.float64) * x).sum(axis=1)
    return dots if bias is None else dots + bias
