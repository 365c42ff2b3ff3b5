"""Streaming backends with one mistake each, under the conformance kit; test_kit_catches.py runs this file.

The right one reads whole bundles, one after the other, before it computes anything.
"""

from __future__ import annotations

import errno
from types import SimpleNamespace

import fail_fast  # noqa: F401  (before the kit makes its settings)
import numpy as np
from pi2.errors import PluginError, StorageError
from pi2.powers import SPANS, SlotState, Stage, StreamCount
from pi2.testing import BackendTests
from pi2.testing.storage_abi import Failure, Read, StorageAbi
from wrong_backends import PlainBackend


class OneByOne(PlainBackend):
    """Right: what the native pipelines must agree with."""

    def open_stream(self, slab, states, storage, *, trace, **how):
        abi = StorageAbi.from_address(storage)
        if abi.version != 1:
            raise PluginError("the storage tier is of another version", hint="install one release")
        return SimpleNamespace(slab=slab, states=states, abi=abi, trace=trace, spans=[], tickets={})

    def start(self, stream, place, neuron, slot):
        """A ticket, or StorageError."""
        bundle = stream.slab.bundles[slot]
        read, failure = (
            Read(place.offset + int(neuron) * len(bundle), len(bundle), bundle.ctypes.data),
            Failure(),
        )
        ticket = stream.abi.submit(stream.abi.self, place.file, read, 1, 0, failure)
        if ticket == 0:
            raise StorageError.from_errno(failure.code, path=place.path, offset=failure.offset)
        return ticket

    def finish(self, stream, ticket, slot):
        """How the read ended; the slot's state."""
        failure = Failure()
        stream.abi.wait(stream.abi.self, ticket, -1.0, failure)
        stream.states[slot] = SlotState.EMPTY if failure.code else SlotState.PRESENT
        return failure

    def failed(self, stream, place, slot, failure):
        raise StorageError.from_errno(failure.code, path=place.path, offset=failure.offset)

    def stream_ffn(self, stream, place, neurons, slots, x, out, meanwhile=None):
        count, size = StreamCount(), stream.slab.bundles.shape[1]
        count.present = int((stream.states[slots] == SlotState.PRESENT).sum())
        while set(slots) & set(stream.tickets):
            self.settle_one(stream, next(iter(set(slots) & set(stream.tickets))))
        for neuron, slot in zip(neurons, slots, strict=True):
            if stream.states[slot] == SlotState.PRESENT:
                continue
            stream.states[slot] = SlotState.EMPTY
            failure = self.finish(stream, self.start(stream, place, neuron, slot), slot)
            if failure.code:
                self.failed(stream, place, slot, failure)
            count.reads += 1
            count.bytes_read += size
            self.note(stream, place, neuron, Stage.GATE_READ, 255)
        for neuron in neurons:
            self.note(stream, place, neuron, Stage.GATE_COMPUTE, 0)
        if meanwhile is not None:
            meanwhile()
        count.active = self.slab_ffn(stream.slab, neurons, slots, x, out)
        return count

    def note(self, stream, place, neuron, stage, thread):
        if stream.trace:
            stream.spans.append((place.ffn, neuron, stage, thread, 1, 0.0, 1.0))

    def stream_prefetch(self, stream, place, neurons, slots):
        for neuron, slot in zip(neurons, slots, strict=True):
            stream.tickets[slot] = self.start(stream, place, neuron, slot)
            stream.states[slot] = SlotState.LOADING

    def settle_one(self, stream, slot):
        return 0 if self.finish(stream, stream.tickets.pop(slot), slot).code else stream.slab.bundles.shape[1]

    def stream_settle(self, stream, slots=None, *, cancel=False):
        chosen = [s for s in list(stream.tickets) if slots is None or s in slots]
        for slot in chosen if cancel else ():
            stream.abi.cancel(stream.abi.self, stream.tickets[slot])
        return sum(self.settle_one(stream, slot) for slot in chosen)

    def stream_spans(self, stream):
        spans, stream.spans = np.array(stream.spans, SPANS), []
        return spans

    def close_stream(self, stream):
        self.stream_settle(stream)


class TestOneByOne(BackendTests):
    plugin = OneByOne


class TestComputesBeforeTheBytesAreThere(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def stream_ffn(self, stream, place, neurons, slots, x, out, meanwhile=None):
            self.slab_ffn(stream.slab, neurons, slots, x, out)
            return super().stream_ffn(stream, place, neurons, slots, x, out.copy(), meanwhile)


class TestTakesAGateForAWholeNeuron(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def stream_ffn(self, stream, place, neurons, slots, x, out, meanwhile=None):
            stream.states[stream.states == SlotState.GATE] = SlotState.PRESENT
            return super().stream_ffn(stream, place, neurons, slots, x, out, meanwhile)


class TestUsesWhatItCouldNotRead(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def failed(self, stream, place, slot, failure):
            if failure.code != errno.ENODATA:
                stream.states[slot] = SlotState.PRESENT


class TestLeavesReadsBehind(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def close_stream(self, stream):
            pass


class TestCountsBytesThatItDidNotRead(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def stream_settle(self, stream, slots=None, *, cancel=False):
            nbytes = super().stream_settle(stream, slots, cancel=cancel)
            return nbytes + cancel


class TestTracesUnasked(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def note(self, stream, place, neuron, stage, thread):
            stream.spans.append((place.ffn, neuron, stage, thread, 1, 0.0, 1.0))


class TestForgetsWhatItIsToDoMeanwhile(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def stream_ffn(self, stream, place, neurons, slots, x, out, meanwhile=None):
            return super().stream_ffn(stream, place, neurons, slots, x, out)


class TestCountsNeuronsThatItHadToRead(BackendTests):
    class plugin(OneByOne):  # noqa: N801
        def stream_ffn(self, stream, place, neurons, slots, x, out, meanwhile=None):
            count = super().stream_ffn(stream, place, neurons, slots, x, out, meanwhile)
            count.present = len(neurons)
            return count
