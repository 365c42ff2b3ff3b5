"""Neurons in slabs, and neurons that stream in from flash while others are computed (pi2.powers)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from pi2.api import FfnSpec
from pi2.errors import PluginError, StorageError
from pi2.powers import SPANS, FfnPlace, Spans, StreamCount
from pi2.tensor import F32, U8, Ids

from pi2_backend_cpu import native


@dataclass(frozen=True, slots=True)
class Slab:
    """A C structure, and the bytes that it points into: the caller's."""

    struct: native.Ffn
    page: int
    bytes: U8


@dataclass(slots=True)
class Stream:
    """The library's stream (None: closed), and what it points to."""

    address: int | None
    slab: Slab
    states: U8


class Streaming:
    """Half of the backend: ``SupportsStreaming``."""

    _lib: ctypes.CDLL
    _cpu: int | None

    def place_slab(self, slab: U8, neurons: int, spec: FfnSpec) -> Slab:
        return Slab(native.ffn_of(slab, neurons, spec), spec.geometry.page, slab)

    def slab_ffn(self, slab: Slab, neurons: Ids, slots: Ids, x: F32, out: F32) -> int:
        active: int = self._lib.pi2_cpu_slab_ffn(
            self._cpu, slab.struct, x.ctypes.data, len(x), *_selected(neurons, slots), out.ctypes.data
        )
        return active

    def open_stream(
        self, slab: Slab, states: U8, storage: int, *, two_phase: bool, cluster: int, trace: bool,
        overlap: bool = True, bundled: bool = True,
    ) -> Stream:  # fmt: skip
        address: int | None = self._lib.pi2_cpu_stream_open(
            self._cpu, slab.struct, states.ctypes.data, len(states), storage, slab.page, two_phase,
            max(1, cluster), trace, overlap, bundled,
        )  # fmt: skip
        if address is None:
            raise PluginError(
                "the storage tier offers another version of the native interface than the cpu backend reads",
                hint="install pi2's plugins from one release",
            )
        return Stream(address, slab, states)

    def stream_ffn(
        self, stream: Stream, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, out: F32,
        meanwhile: Callable[[], None] | None = None,
    ) -> StreamCount:  # fmt: skip
        count, failure, address = native.StreamCount(), native.Failure(), _open(stream)
        try:
            self._lib.pi2_cpu_stream_begin(
                address, byref(_place(place)), *_selected(neurons, slots), x.ctypes.data
            )
            if meanwhile is not None:
                meanwhile()
        finally:
            code = self._lib.pi2_cpu_stream_finish(address, out.ctypes.data, byref(count), byref(failure))
        if code != 0:
            raise StorageError.from_errno(failure.code, path=place.path, offset=failure.offset)
        return StreamCount(*_counts(count))

    def stream_prefetch(self, stream: Stream, place: FfnPlace, neurons: Ids, slots: Ids) -> None:
        failure = native.Failure()
        code = self._lib.pi2_cpu_stream_prefetch(
            _open(stream), byref(_place(place)), *_selected(neurons, slots), byref(failure)
        )
        if code != 0:
            raise StorageError.from_errno(failure.code, path=place.path, offset=failure.offset)

    def stream_settle(self, stream: Stream, slots: Ids | None = None, *, cancel: bool = False) -> int:
        address, k = (None, 0) if slots is None else (slots.ctypes.data, len(slots))
        nbytes: int = self._lib.pi2_cpu_stream_settle(_open(stream), address, k, cancel)
        return nbytes

    def stream_spans(self, stream: Stream) -> Spans:
        spans = np.empty(self._lib.pi2_cpu_stream_spans(_open(stream), None), SPANS)
        self._lib.pi2_cpu_stream_spans(stream.address, spans.ctypes.data)
        return spans

    def close_stream(self, stream: Stream) -> None:
        if stream.address is not None:
            self._lib.pi2_cpu_stream_close(stream.address)
            stream.address = None


_counts = attrgetter("active", "present", "reads", "bytes_read", "wall_s", "wait_s", "gate_s", "up_down_s")


def _open(stream: Stream) -> int:
    if stream.address is None:
        raise PluginError("the stream is closed", hint="open another one")
    return stream.address


def _place(place: FfnPlace) -> native.Place:
    return native.Place(place.file, place.offset, place.ffn)


def _selected(neurons: Ids, slots: Ids) -> tuple[int, int, int]:
    """Addresses of ids and slots, and how many they are."""
    return neurons.ctypes.data, slots.ctypes.data, len(neurons)
