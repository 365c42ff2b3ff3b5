"""Reading and computing one FFN out of the slab of a neuron cache: native, and its slow twin in Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from pi2.api import Backend, FfnSpec, Ranges, StorageTier
from pi2.errors import StorageError
from pi2.gates import maybe_active
from pi2.memory import aligned_bytes
from pi2.powers import (
    SPANS,
    FfnPlace,
    SlotState,
    Spans,
    Stage,
    StreamCount,
    SupportsAsyncRead,
    SupportsSlab,
    SupportsStreaming,
)
from pi2.tensor import F32, U8, Ids, Tensor

_STAGING = 8 << 20  # bytes read at once


class FfnPipeline(Protocol):
    """Computes neurons that lie in slots of a slab, or still on flash."""

    def ffn(
        self, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, out: F32, meanwhile: Callable[[], None]
    ) -> StreamCount:
        """``SupportsStreaming.stream_ffn``."""
        ...

    def prefetch(self, place: FfnPlace, neurons: Ids, slots: Ids) -> None:
        """``SupportsStreaming.stream_prefetch``."""
        ...

    def settle(self, slots: Ids | None = None, *, cancel: bool = False) -> int:
        """``SupportsStreaming.stream_settle``."""
        ...

    def spans(self) -> Spans:
        """``SupportsStreaming.stream_spans``."""
        ...

    def close(self) -> None:
        """Nothing reads or computes any more: the slab is the caller's."""
        ...


class NativePipeline:
    """The backend's own, on the storage tier's C ABI."""

    def __init__(
        self, backend: SupportsStreaming, slab: Any, states: U8, storage: int, *, two_phase: bool,
        cluster: int, trace: bool, overlap: bool = True, bundled: bool = True,
    ) -> None:  # fmt: skip
        self._backend = backend
        self._stream = backend.open_stream(
            slab, states, storage, two_phase=two_phase, cluster=cluster, trace=trace, overlap=overlap,
            bundled=bundled,
        )  # fmt: skip

    def ffn(
        self, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, out: F32, meanwhile: Callable[[], None]
    ) -> StreamCount:
        return self._backend.stream_ffn(self._stream, place, neurons, slots, x, out, meanwhile)

    def prefetch(self, place: FfnPlace, neurons: Ids, slots: Ids) -> None:
        self._backend.stream_prefetch(self._stream, place, neurons, slots)

    def settle(self, slots: Ids | None = None, *, cancel: bool = False) -> int:
        return self._backend.stream_settle(self._stream, slots, cancel=cancel)

    def spans(self) -> Spans:
        return self._backend.stream_spans(self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._backend.close_stream(self._stream)
        self._stream = None


@dataclass(slots=True)
class _Guess:
    """A prefetch under way, into memory of its own."""

    ticket: int
    slots: Ids
    data: U8


class PythonPipeline:
    """Reads what is missing, then computes: the semantics of the native pipeline without its overlap.

    Any backend and any tier will do.  Without ``SupportsAsyncRead`` a prefetch reads nothing.
    """

    def __init__(
        self, backend: Backend, tier: StorageTier, slab: U8, states: U8, neurons: int, spec: FfnSpec, *,
        two_phase: bool, trace: bool = False, bundled: bool = True,
    ) -> None:  # fmt: skip
        self._backend, self._tier = backend, tier
        self._slab, self._states, self._spec = slab, states, spec
        self._slabs = backend if isinstance(backend, SupportsSlab) else None
        self._placed = self._slabs.place_slab(slab, neurons, spec) if self._slabs else None
        self._head = head_bytes(spec) if two_phase else None
        self._parts = [(0, slab.shape[1])] if bundled else rows_of(spec)
        self._async = tier if isinstance(tier, SupportsAsyncRead) else None
        self._guesses: list[_Guess] = []
        self._trace = trace
        self._spans: list[tuple[int, int, int, int, int, float, float]] = []

    def ffn(
        self, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, out: F32, meanwhile: Callable[[], None]
    ) -> StreamCount:
        start, count = time.perf_counter(), StreamCount()
        states = self._states
        count.present = int(np.count_nonzero(states[slots] == SlotState.PRESENT))
        count.bytes_read += self.settle(slots[states[slots] == SlotState.LOADING])
        count.wait_s += time.perf_counter() - start
        empty = states[slots] == SlotState.EMPTY
        if self._head is None:
            for part in self._parts:
                self._load(place, neurons[empty], slots[empty], part, count, SlotState.EMPTY)
            states[slots] = SlotState.PRESENT
        else:
            self._load(place, neurons[empty], slots[empty], (0, self._head), count, SlotState.GATE)
            self._load_active(place, neurons, slots, x, count)
            present = states[slots] == SlotState.PRESENT
            neurons, slots = neurons[present], slots[present]
        meanwhile()
        begin = time.perf_counter()
        count.active = self._compute(neurons, slots, x, out)
        end = time.perf_counter()
        self._note(place, Stage.UP_DOWN_COMPUTE, len(neurons), begin, end)
        count.up_down_s += end - begin
        count.wall_s = end - start
        return count

    def _load_active(self, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, count: StreamCount) -> None:
        """The rest of the bundles of which only the gate is there, unless it is surely zero."""
        start = time.perf_counter()
        partial = np.flatnonzero(self._states[slots] == SlotState.GATE)
        if not len(partial):
            return
        g = self._spec.geometry
        assert g.gate is not None  # else there is one phase only
        offset, size = g.segments()["gate"]
        gates = Tensor(self._slab[slots[partial], offset : offset + size], g.gate, g.d_model)
        partial = partial[maybe_active(self._backend, gates, x)]
        end = time.perf_counter()
        count.gate_s += end - start
        self._note(place, Stage.GATE_COMPUTE, len(gates.data), start, end)
        assert self._head is not None
        self._load(place, neurons[partial], slots[partial], (self._head, self._slab.shape[1]), count)

    def _load(
        self, place: FfnPlace, neurons: Ids, slots: Ids, part: tuple[int, int], count: StreamCount,
        state: SlotState = SlotState.PRESENT,
    ) -> None:  # fmt: skip
        """Bytes ``part`` of the bundles of ``neurons`` into their slots, which are in ``state`` then."""
        first, last = part
        step = max(1, _STAGING // (last - first))
        for at in range(0, len(neurons), step):
            begin = time.perf_counter()
            chunk = slice(at, at + step)
            ranges = bundle_ranges(place, neurons[chunk], self._slab.shape[1], part)
            n = len(neurons[chunk])
            staging = aligned_bytes(n * (last - first)).reshape(n, last - first)
            read_ranges(self._tier, place.file, ranges, staging.reshape(-1))
            self._slab[slots[chunk], first:last] = staging
            self._states[slots[chunk]] = state
            end = time.perf_counter()
            count.reads += len(ranges)
            count.bytes_read += staging.nbytes
            count.wait_s += end - begin
            stage = Stage.UP_DOWN_READ if first else Stage.GATE_READ
            self._note(place, stage, len(staging), begin, end)

    def _compute(self, neurons: Ids, slots: Ids, x: F32, out: F32) -> int:
        if not len(neurons):
            out[:] = 0
            return 0
        if self._slabs is not None:
            return self._slabs.slab_ffn(self._placed, neurons, slots, x, out)
        placed = self._backend.place_ffn(self._slab[slots], self._spec)
        try:
            return self._backend.ffn(placed, x, out)
        finally:
            self._backend.release(placed)

    def prefetch(self, place: FfnPlace, neurons: Ids, slots: Ids) -> None:
        if self._async is None or not len(neurons):
            return
        stride = self._slab.shape[1]
        data = aligned_bytes(len(neurons) * stride).reshape(-1, stride)
        ranges = bundle_ranges(place, neurons, stride, (0, stride))
        ticket = self._async.submit(place.file, ranges, data.reshape(-1), priority=1)
        self._guesses.append(_Guess(ticket, slots, data))
        self._states[slots] = SlotState.LOADING

    def settle(self, slots: Ids | None = None, *, cancel: bool = False) -> int:
        read, left = 0, []
        while self._guesses:
            guess = self._guesses.pop()
            asked = None if slots is None else np.isin(guess.slots, slots)
            if asked is not None and not asked.any():
                left.append(guess)
                continue
            whole = asked is None or bool(asked.all())  # a guess is one ticket: it ends as a whole
            try:
                read += self._end(guess, cancel=cancel and whole)
            except BaseException:
                self._guesses += left
                raise
        self._guesses = left
        return read

    def _end(self, guess: _Guess, *, cancel: bool) -> int:
        self._states[guess.slots] = SlotState.EMPTY
        assert self._async is not None  # else there were no guesses
        if cancel and not self._async.poll(guess.ticket):
            self._async.cancel(guess.ticket)
            return 0
        try:
            self._async.wait(guess.ticket)
        except StorageError:  # only a guess: whoever needs these neurons reads them again and is told
            return 0
        except KeyboardInterrupt:
            self._async.cancel(guess.ticket)
            raise
        self._slab[guess.slots] = guess.data
        self._states[guess.slots] = SlotState.PRESENT
        return guess.data.nbytes

    def _note(self, place: FfnPlace, stage: Stage, neurons: int, start: float, end: float) -> None:
        if self._trace:
            self._spans.append((place.ffn, 0, stage, 0, neurons, start, end))

    def spans(self) -> Spans:
        spans = np.array(self._spans, SPANS)
        self._spans.clear()
        return spans

    def close(self) -> None:
        self.settle(cancel=True)


def head_bytes(spec: FfnSpec) -> int | None:
    """Bytes of a bundle that two-phase loading reads first: the pages of its gate.

    None where it saves nothing or decides nothing: no page lies behind the gate's, the gate needs a bias
    from there, or the activation has no exact zeros.
    """
    g = spec.geometry
    if g.gate is None or g.biased or spec.activation not in ("relu", "relu2"):
        return None
    head = -(-g.segments()["up"][0] // g.page) * g.page
    return head if head < g.stride else None


def rows_of(spec: FfnSpec) -> list[tuple[int, int]]:
    """First and last + 1 byte of each row of a bundle; the last has what lies behind it, too."""
    places = spec.geometry.segments()
    starts = [places[name][0] for name in ("gate", "up", "down") if name in places]
    return list(pairwise((*starts, spec.geometry.stride)))


def bundle_ranges(place: FfnPlace, neurons: Ids, stride: int, part: tuple[int, int]) -> Ranges:
    """Where bytes ``part`` of the bundles of ``neurons`` lie in the file; neighbours that touch are one."""
    first, last = part
    starts = place.offset + neurons.astype(np.int64) * stride + first
    breaks = np.ones(len(starts) + 1, np.bool_)
    breaks[1:-1] = starts[1:] != starts[:-1] + (last - first)
    at = np.flatnonzero(breaks)
    return np.stack((starts[at[:-1]], np.diff(at) * (last - first)), axis=1)


def read_ranges(tier: StorageTier, file: int, ranges: Ranges, into: U8) -> None:
    """``StorageTier.read``, after which nobody writes to ``into``, also if it is interrupted."""
    if not isinstance(tier, SupportsAsyncRead):
        tier.read(file, ranges, into)
        return
    ticket = tier.submit(file, ranges, into)
    try:
        tier.wait(ticket)
    except KeyboardInterrupt:
        tier.cancel(ticket)
        raise
