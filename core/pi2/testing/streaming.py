"""Conformance tests of ``pi2.powers.SupportsStreaming``, an optional power; part of BackendTests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.random import Generator

from pi2.api import Backend, FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import PluginError, StorageError
from pi2.powers import FfnPlace, SlotState, Stage, StreamCount, SupportsStreaming
from pi2.tensor import F32, U8, Ids
from pi2.testing.flash import Flash
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.slab import SlabCase, slab_cases
from pi2.testing.strategies import ffn_specs, generators, paged_specs

_STORAGE_THREAD = 255
_LOADING = 9  # in the plan of a case: to be prefetched
PLACE = FfnPlace(ffn=3, path=Path("neurons"), file=0, offset=4096)


@dataclass(frozen=True, slots=True)
class StreamCase:
    """A call of ``slab_ffn`` whose slots are in any state, and how the stream is to be opened."""

    slab: SlabCase
    plan: U8
    """(neurons of the FFN,) What the slot of each holds before the call."""
    how: dict[str, Any]
    patience: int
    rng: Generator


@st.composite
def stream_cases(draw: DrawFn) -> StreamCase:
    """Any FFN, rows and slots; from nothing resident to everything."""
    slab, rng = draw(slab_cases(tokens=(1,), specs=ffn_specs() | paged_specs())), draw(generators)
    kinds = (SlotState.EMPTY, SlotState.GATE, SlotState.PRESENT, _LOADING)
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    plan = rng.choice(np.array(chosen, np.uint8), len(slab.ffn.bundles))
    how: dict[str, Any] = {name: draw(st.booleans()) for name in ("two_phase", "overlap", "bundled")}
    how["cluster"] = draw(st.sampled_from((1, 3, 16, 1000)))
    return StreamCase(slab, plan, how, draw(st.sampled_from((0, 1, 4))), rng)


class Running:
    """An opened stream over a slab in the states that a case asks for, and the flash beneath it."""

    def __init__(self, backend: Any, case: StreamCase, trace: bool = False) -> None:
        self.backend, self.case = backend, case
        ffn, slots = case.slab.ffn, case.slab.slots
        bundles = ffn.bundles
        before = case.rng.integers(0, 256, PLACE.offset, dtype=np.uint8)
        self.flash = Flash(np.concatenate((before, bundles.reshape(-1))), case.rng, case.patience)
        self.slab = case.slab.empty_slab(0)
        self.states = np.zeros(len(self.slab), np.uint8)
        self.handle = backend.place_slab(self.slab, len(bundles), ffn.spec)
        rows, plan = case.slab.rows, case.plan[case.slab.rows]
        for row, slot, state in zip(rows, slots, plan, strict=True):
            if state in (SlotState.GATE, SlotState.PRESENT):
                end = self.gate_end if state == SlotState.GATE else bundles.shape[1]
                self.slab[slot, :end] = bundles[row, :end]
                self.states[slot] = state
        address = self.flash.abi_address()
        self.stream = backend.open_stream(self.handle, self.states, address, trace=trace, **case.how)
        loading = plan == _LOADING
        self.guessed, self.guessed_slots = rows[loading], slots[loading]

    @property
    def gate_end(self) -> int:
        """Bytes of a bundle that are there in the state GATE: whole pages."""
        geometry = self.case.slab.ffn.spec.geometry
        end = geometry.segments().get("gate", (0, 0))[1]
        return min(geometry.stride, -(-end // geometry.page) * geometry.page)

    def prefetch(self) -> None:
        self.backend.stream_prefetch(self.stream, PLACE, self.guessed, self.guessed_slots)

    def ffn(self, meanwhile: Callable[[], None] | None = None) -> tuple[F32, StreamCount]:
        x, slab = self.case.slab.ffn.x, self.case.slab
        out = np.full_like(x, np.nan)
        count = self.backend.stream_ffn(self.stream, PLACE, slab.rows, slab.slots, x, out, meanwhile)
        return out, count

    def attempt(self) -> tuple[F32, StorageError | None]:
        """``ffn``, or how it failed."""
        try:
            return self.ffn()[0], None
        except StorageError as error:
            return np.empty(0, np.float32), error

    def expected(self, rows: Ids | None = None) -> tuple[F32, int]:
        """By ``slab_ffn`` of a slab that has everything."""
        case = self.case.slab.ffn
        rows = self.case.slab.rows if rows is None else rows
        full = self.backend.place_slab(case.bundles, len(case.bundles), case.spec)
        out = np.full_like(case.x, np.nan)
        active = self.backend.slab_ffn(full, rows, rows, case.x, out)
        self.backend.release(full)
        return out, active

    def active(self) -> set[int]:
        """Rows whose neuron fires."""
        return {int(row) for row in self.case.slab.rows if self.expected(np.array([row], np.int32))[1]}

    def check_bytes(self) -> None:
        """What a slot's state promises is there."""
        bundles = self.case.slab.ffn.bundles
        for row, slot in zip(self.case.slab.rows, self.case.slab.slots, strict=True):
            end = {SlotState.GATE: self.gate_end, SlotState.PRESENT: bundles.shape[1]}.get(
                self.states[slot], 0
            )
            assert np.array_equal(self.slab[slot, :end], bundles[row, :end])

    def close(self) -> None:
        self.backend.close_stream(self.stream)
        assert not self.flash.tickets, "reads that nobody waited for"
        self.backend.release(self.handle)


class StreamingTests(PluginTests):
    """What ``SupportsStreaming`` promises: the bits of ``slab_ffn``, whatever is read and when."""

    @pytest.fixture(scope="class")
    @classmethod
    def streaming(cls, backend: Backend) -> Any:
        """The opened backend, if it has the power."""
        if not isinstance(backend, SupportsStreaming):
            pytest.skip(f"{backend.name} does not stream (an optional power, pi2.powers.SupportsStreaming)")
        return backend

    @examples(150)
    @given(case=stream_cases())
    def test_a_stream_gives_the_bits_of_a_full_slab(self, streaming: Any, case: StreamCase) -> None:
        running = Running(streaming, case)
        running.prefetch()
        before = running.slab.copy()
        present = np.count_nonzero(case.plan[case.slab.rows] == SlotState.PRESENT)
        for again in range(2):
            out, count = running.ffn()
            expected, active = running.expected()
            assert out.tobytes() == expected.tobytes()
            assert count.active == active
            assert again or count.present == present
        assert count.bytes_read == 0, "the second call found everything there"
        running.check_bytes()
        firing = running.active()
        for row, slot in zip(case.slab.rows, case.slab.slots, strict=True):
            resting = running.states[slot] == SlotState.GATE and int(row) not in firing
            assert running.states[slot] == SlotState.PRESENT or resting
        others = np.setdiff1d(np.arange(len(running.slab)), case.slab.slots)
        assert np.array_equal(running.slab[others], before[others])
        running.close()

    @examples(100)
    @given(case=stream_cases(), where=st.sampled_from(("anywhere", "gate", "end")), share=st.floats(0, 1))
    def test_a_failed_read_ends_the_call_and_nothing_else(
        self, streaming: Any, case: StreamCase, where: str, share: float
    ) -> None:
        """In either phase, or of a prefetch.  When the flash is well again, so is the stream."""
        running = Running(streaming, case)
        running.prefetch()
        stride = case.slab.ffn.bundles.shape[1]
        bad = running.flash.bad[PLACE.offset :].reshape(-1, stride)
        broken = case.rng.random(len(bad)) < share
        at = {"gate": 0, "end": stride - 1, "anywhere": int(case.rng.integers(stride))}[where]
        bad[broken, at] = True
        out, error = running.attempt()
        if error:
            assert error.path == PLACE.path
            assert error.offset is not None
            assert error.offset >= PLACE.offset
            assert error.hint
        else:
            assert out.tobytes() == running.expected()[0].tobytes()
            absent = np.isin(case.plan, (SlotState.EMPTY, _LOADING))
            certain = {row for row in running.active() if absent[row]}  # these were read whole
            assert not broken[sorted(certain)].any(), "what could not be read was used"
        assert not running.flash.tickets, "the call left reads behind"
        running.check_bytes()
        assert SlotState.LOADING not in running.states[case.slab.slots]
        running.flash.bad[:] = False
        assert running.ffn()[0].tobytes() == running.expected()[0].tobytes()
        running.close()

    @examples(60)
    @given(case=stream_cases(), cancel=st.booleans(), fails=st.booleans())
    def test_a_settled_prefetch_is_there_or_is_not(
        self, streaming: Any, case: StreamCase, cancel: bool, fails: bool
    ) -> None:
        running = Running(streaming, case)
        running.flash.bad[:] = fails
        running.prefetch()
        assert np.all(running.states[running.guessed_slots] == SlotState.LOADING)
        half = running.guessed_slots[: len(running.guessed_slots) // 2].copy()
        nbytes = streaming.stream_settle(running.stream, half, cancel=cancel)
        assert SlotState.LOADING not in running.states[half]
        nbytes += streaming.stream_settle(running.stream, cancel=cancel)
        states = running.states[running.guessed_slots]
        assert not running.flash.tickets
        assert set(states.tolist()) <= {SlotState.EMPTY, SlotState.PRESENT}
        assert nbytes == running.flash.bytes_read
        assert nbytes == np.count_nonzero(states) * running.slab.shape[1]
        assert cancel or np.all(states == (SlotState.EMPTY if fails else SlotState.PRESENT))
        running.check_bytes()
        running.close()

    @examples(60)
    @given(case=stream_cases(), fails=st.booleans())
    def test_something_else_is_done_meanwhile(self, streaming: Any, case: StreamCase, fails: bool) -> None:
        """Products on the same backend, and a prefetch into another slot.  Its error ends the call."""
        running, calls = Running(streaming, case), []
        running.prefetch()
        spare = np.setdiff1d(np.arange(len(running.slab)), case.slab.slots)[:1].astype(np.int32)

        def meanwhile() -> None:
            calls.append(running.expected()[0])
            streaming.stream_prefetch(running.stream, PLACE, np.zeros_like(spare), spare)
            if fails:
                raise ArithmeticError

        if fails:
            with pytest.raises(ArithmeticError):
                running.ffn(meanwhile)
        else:
            assert running.ffn(meanwhile)[0].tobytes() == running.expected()[0].tobytes()
        assert [out.tobytes() for out in calls] == [running.expected()[0].tobytes()]
        assert SlotState.LOADING not in running.states[case.slab.slots]
        assert streaming.stream_settle(running.stream) == spare.size * running.slab.shape[1]
        assert running.ffn()[0].tobytes() == running.expected()[0].tobytes()
        running.close()

    @examples(20)
    @given(case=stream_cases())
    def test_a_stream_may_be_closed_while_it_reads(self, streaming: Any, case: StreamCase) -> None:
        running = Running(streaming, case)
        running.prefetch()
        running.close()

    @examples(40)
    @given(case=stream_cases(), trace=st.booleans())
    def test_spans_tell_what_was_done(self, streaming: Any, case: StreamCase, trace: bool) -> None:
        running = Running(streaming, case, trace)
        _, count = running.ffn()
        spans = streaming.stream_spans(running.stream)
        assert len(streaming.stream_spans(running.stream)) == 0
        running.close()
        if not trace:
            assert len(spans) == 0
            return
        assert np.all(spans["ffn"] == PLACE.ffn)
        assert np.all(spans["start"] <= spans["end"])
        reads = np.isin(spans["stage"], (Stage.GATE_READ, Stage.UP_DOWN_READ))
        assert np.array_equal(spans["thread"] == _STORAGE_THREAD, reads)
        assert spans["neurons"][reads].sum() == count.reads
        assert np.isin(spans["cluster"], case.slab.rows).all()
        gates = spans["neurons"][spans["stage"] == Stage.GATE_COMPUTE].sum()
        assert gates == len(case.slab.rows)

    @examples(30)
    @given(case=stream_cases())
    def test_a_place_beyond_the_file_is_refused(self, streaming: Any, case: StreamCase) -> None:
        running = Running(streaming, case)
        assume(len(case.slab.rows) > 0 and SlotState.EMPTY in running.states[case.slab.slots])
        running.flash.data = running.flash.data[: PLACE.offset]
        with pytest.raises(StorageError, match="ends before the read"):
            running.ffn()
        if len(running.guessed):
            with pytest.raises(StorageError, match="ends before the read"):
                running.prefetch()
        assert SlotState.LOADING not in running.states
        running.close()

    def test_another_version_of_the_interface_is_refused(self, streaming: Any) -> None:
        flash = Flash(np.zeros(1, np.uint8), np.random.default_rng(0))
        flash.claim_version(2)
        with pytest.raises(PluginError, match="another version"):
            _open_any(streaming, flash)


def _open_any(backend: Any, flash: Flash) -> object:
    """A stream over the smallest slab."""
    geometry = BundleGeometry(32, "f32", "f32", "f32")
    slab = np.zeros((1, geometry.stride), np.uint8)
    handle = backend.place_slab(slab, 1, FfnSpec(geometry, "relu"))
    states = np.zeros(1, np.uint8)
    return backend.open_stream(handle, states, flash.abi_address(), two_phase=True, cluster=1, trace=False)
